"""Write csrc/records.h from src/quantpage/cpu_core/interface.py.

python scripts/interface.py           rewrite it
python scripts/interface.py --check   exit 1 where it is out of date
"""

import sys
from pathlib import Path

from quantpage.cpu_core.interface import header

HEADER = Path(__file__).parent.parent / "csrc" / "records.h"


def main() -> int:
    """Rewrite or check; the exit status."""
    if "--check" in sys.argv[1:]:
        if not HEADER.is_file() or HEADER.read_text() != header():
            print(f"{HEADER.name}: out of date; run scripts/interface.py")
            return 1
        return 0
    HEADER.write_text(header())
    return 0


if __name__ == "__main__":
    sys.exit(main())
