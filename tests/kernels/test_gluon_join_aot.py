"""What joins many rows on Hopper compiles to, without a GPU."""

import pytest

from tests.kernels.apart import compile_apart, count
from tests.kernels.gluon_join_case import CASES

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def compiled():
    """Name of a case -> its resources."""
    return compile_apart("tests.kernels.gluon_join_case")


@pytest.mark.parametrize("name", list(CASES))
def test_nothing_crosses_warps(compiled, name):
    found = compiled[name]
    assert found["shared"] == 0 and count(found, "BAR|LDS|STS|LDL|STL") == 0
    # Within one, neighbours of the rotation: of 32 threads five times, of four channels.
    turned = CASES[name].get("turn", 0) > 0
    assert count(found, "SHFL") == (4 * 5 if turned else 0)


@pytest.mark.parametrize("name", list(CASES))
def test_twice_the_rows_of_triton_cuts_fit_on_a_multiprocessor(compiled, name):
    """Where programs of one warp have 120 registers a thread: 17 rows."""
    registers = -(-compiled[name]["registers"] // 8) * 8
    assert 65536 // (registers * 128) * 4 >= 34
