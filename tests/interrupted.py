"""Raising in the middle: between any two instructions of the package's own Python."""

import sys
from pathlib import Path

import quantpage

ROOT = str(Path(quantpage.__file__).parent)


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which no test could tell from a real one."""


def run(act, at=None, inside=ROOT, kind=Interrupted):
    """Run ``act``; raise ``kind`` before instruction number ``at`` of code below ``inside``.

    Returns the instructions that ran, and whether it was interrupted. Nothing else is caught.
    """
    passed, thrown = 0, False

    def trace(frame, event, _):
        nonlocal passed, thrown
        if not frame.f_code.co_filename.startswith(inside):
            return None
        frame.f_trace_opcodes = True
        # Without a line: how a closed generator is left, which is traced from 3.12 on. What is
        # raised there reaches no caller, and no signal is served there.
        if event == "opcode" and frame.f_lineno is not None and not thrown:
            passed += 1
            if passed == at:
                thrown = True
                raise kind
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except kind:
        pass
    finally:
        sys.settrace(before)
    return passed, thrown
