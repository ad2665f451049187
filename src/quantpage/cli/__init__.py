"""The `quantpage` command. A module a command; each turns flags into one call of the library.

Only the standard library is imported here, and no module of a command imports torch before the
command runs: it takes seconds, for which neither help nor a wrong flag has to wait.
"""

import sys
from collections.abc import Sequence

from quantpage.cli.interrupts import leaving_at_once


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code (docs/commands.md)."""
    with leaving_at_once():
        from quantpage.cli.app import run
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
