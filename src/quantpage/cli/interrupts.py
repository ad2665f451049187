"""Ctrl-C while modules are imported: nothing has begun that would have to be undone.

An exception could be taken for a failed import there. Only the standard library is imported here.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from quantpage.cli.exit_codes import INTERRUPTED


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Where Ctrl-C would raise KeyboardInterrupt, it ends the process with a line."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        # A shell's background job ignores it, as it should.
        yield
        return
    try:
        signal.signal(signal.SIGINT, _leave)
    except ValueError:
        # Another thread than the first hears of no signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"quantpage: interrupted\n")
    os._exit(INTERRUPTED)
