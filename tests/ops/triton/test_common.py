"""What every launch pays for: constants, compared by identity, and arguments, not too many."""

import copy
import importlib
import inspect
import pkgutil

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import TIER

# isort: split
import pytest
import triton.language as tl

import quantpage.ops
from quantpage.ops.triton.common import Constant

pytestmark = TIER


def test_a_constant_is_its_own_copy_and_notices_another():
    one = Constant(7)
    assert copy.deepcopy(one) is one
    for other, differs in ((one, False), (Constant(7), False), (Constant(8), True)):
        assert bool(one != other) is differs
    assert one == tl.constexpr(7) and tl.constexpr(8) != one


def modules() -> list[str]:
    """All of ops: those that need a GPU's package can be imported here as well."""
    return [each.name for each in pkgutil.walk_packages(quantpage.ops.__path__, "quantpage.ops.")]


@pytest.mark.parametrize("name", modules())
def test_kernels_have_no_other_constants(name):
    values = vars(importlib.import_module(name))
    slow = [key for key, value in values.items() if type(value) is tl.constexpr]
    assert not slow, f"{name}: expected Constant, got tl.constexpr for {', '.join(slow)}"


@pytest.mark.parametrize("name", modules())
def test_no_kernel_takes_more_than_forty_arguments(name):
    """Constants aside. What goes together is one NamedTuple, as pages in the write kernel."""
    for key, value in vars(importlib.import_module(name)).items():
        if key.endswith("_kernel") and hasattr(value, "fn"):
            given = inspect.signature(value.fn).parameters.values()
            loose = [each.name for each in given if each.annotation is not tl.constexpr]
            assert len(loose) <= 40, f"{key}: {len(loose)} arguments"
