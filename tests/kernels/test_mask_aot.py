"""What the mask kernels compile to for a GPU that is not here."""

import pytest

from tests.kernels.apart import compile_apart, count

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def compiled():
    """Name of a case -> its resources."""
    return compile_apart("tests.kernels.mask_case")


@pytest.mark.parametrize(
    "form", ["causal 1", "causal 2", "rows 1", "both 2", "both 4", "causal 1, output alone"]
)
def test_hopper_kernel_keeps_its_registers(compiled, form):
    found = compiled[f"dense {form}"]
    assert found["stack"] == 0
    assert count(found, "HGMMA") > 0 and count(found, "USETMAXREG") > 0


def test_planner_compiles_for_hopper(compiled):
    assert count(compiled["order"], "LDL|STL") == 0


@pytest.mark.parametrize("case", ["group 1", "256"])
def test_hopper_kernel_fits_shared_memory(compiled, case):
    found = compiled[f"dense causal 1, {case}"]
    assert found["stack"] <= 64
    assert found["shared"] <= 227 * 1024


def test_portable_kernel_keeps_its_registers(compiled):
    for name in ("pages both 4", "pages rows 1, decode", "pages causal 1, output alone"):
        assert count(compiled[name], "LDL|STL") <= 16, name
        assert count(compiled[name], "H?MMA|HGMMA") > 0
