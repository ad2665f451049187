"""Kernels compiled ahead: side by side, in threads, and launched by nobody."""

import pytest

from quantpage.ops.triton.ahead import compile_ahead
from tests.kernels.apart import compile_apart

pytestmark = pytest.mark.cpu


def test_launches_compile_and_do_not_run():
    found = compile_apart("tests.kernels.ahead_case")
    # Two widths, and a kernel that does not compile.
    assert found["asked for"] == found["asked for again"] == 3
    assert found["launched within"] == 0
    # Who is not in the block launches, and waits for kernels that the block asked for.
    assert found["launched by another thread"] == 1
    assert found["launched by who waited"] == 4
    # That one's kernel: those that were asked for came from the disk, where processes put them.
    assert found["compiled here"] == 1
    assert found["devices"] == [[False, 3]]
    assert found["put back"]
    # Nothing is compiled twice by the thread that asked, and what did not compile says so.
    assert found["compiled"] == found["compiled in all"]
    assert found["launched in all"] == 7
    assert found["refused"]


def test_interpreted_launches_run_as_ever():
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here")
    with compile_ahead() as count:
        assert count is None
