"""What the mask kernels compile to for a GPU that is not here."""

import pytest

from tests.kernels.apart import compile_apart, count

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def compiled():
    """Name of a case -> its resources."""
    return compile_apart("tests.kernels.mask_case")


# Bytes of stack a thread: the mask's integers of a partial tile beside scores and output. Full
# tiles touch none of it.
STACK = {"causal 1": 32, "causal 2": 32, "rows 1": 32, "both 2": 96, "both 4": 256}


@pytest.mark.parametrize("form", STACK)
def test_hopper_kernel_spills_at_most_in_partial_tiles(compiled, form):
    found = compiled[f"dense {form}"]
    assert found["stack"] <= STACK[form]
    assert count(found, "HGMMA") > 0 and count(found, "USETMAXREG") > 0


def test_planner_compiles_for_hopper(compiled):
    assert count(compiled["order"], "LDL|STL") == 0


@pytest.mark.parametrize("case", ["group 1", "256"])
def test_hopper_kernel_fits_shared_memory(compiled, case):
    found = compiled[f"dense causal 1, {case}"]
    assert found["stack"] <= 64
    assert found["shared"] <= 227 * 1024


def test_portable_kernel_keeps_its_registers(compiled):
    for name in ("pages both 4", "pages rows 1, decode"):
        assert count(compiled[name], "LDL|STL") <= 16, name
        assert count(compiled[name], "H?MMA|HGMMA") > 0
