"""Fill the tables of measured figures in the pages from benchmarks/results, so that none is typed.

python scripts/figures.py           rewrite the tables
python scripts/figures.py --check   exit 1 where one is out of date

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from figuring import accuracy, decode, kernels, models

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "measured.md",
    ROOT / "docs" / "calibration-measured.md",
    ROOT / "docs" / "decode.md",
    ROOT / "docs" / "decode-measured.md",
    ROOT / "docs" / "write.md",
    ROOT / "docs" / "prefill.md",
    ROOT / "docs" / "masks.md",
    ROOT / "docs" / "memory.md",
    ROOT / "docs" / "vllm.md",
)
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy.accuracy,
    "calibrated": accuracy.calibrated,
    "models": accuracy.models,
    "aims": accuracy.aims,
    "turns": accuracy.turns,
    "positions": accuracy.positions,
    "judged": accuracy.judged,
    "decode": kernels.decode,
    "decode-shares": kernels.decode_shares,
    "planes": kernels.planes,
    "decode-drafts": kernels.decode_drafts,
    "decode-h100": decode.steps,
    "decode-h100-unlike": decode.unlike,
    "decode-h100-drafts": decode.drafts,
    "decode-h100-parts": decode.parts,
    "write": kernels.write,
    "prefill": kernels.prefill,
    "prefill-cases": kernels.prefill_cases,
    "masks": kernels.masks,
    "peers-decode": kernels.peers_decode,
    "peers-prefill": kernels.peers_prefill,
    "gpu-model": models.gpu_model,
    "cpu-model": models.cpu_model,
    "memory": models.memory,
    "vllm": models.vllm,
}


def main() -> int:
    """Rewrite or check; the exit status."""
    stale = []
    for page in PAGES:
        text = page.read_text()
        wanted = MARKED.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)
        if text != wanted:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                page.write_text(wanted)
    if stale and "--check" in sys.argv[1:]:
        names = ", ".join(page.name for page in stale)
        print(f"{names}: figures differ from benchmarks/results; run scripts/figures.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
