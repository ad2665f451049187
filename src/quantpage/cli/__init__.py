"""The `quantpage` command. A module a command; each turns flags into one call of the library.

Only the standard library is imported here: torch takes seconds, in which Ctrl-C has to end in a
line as it does later.
"""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from quantpage.cli.exit_codes import INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave with its exit code (docs/commands.md)."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell's background job ignores it, as it should
        signal.signal(signal.SIGINT, _leave_at_once)
    from quantpage.cli.app import run

    signal.signal(signal.SIGINT, before)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """Ctrl-C while modules are imported: nothing has begun that would have to be undone, and an
    exception could be taken for a failed import."""
    os.write(2, b"quantpage: interrupted\n")
    os._exit(INTERRUPTED)
