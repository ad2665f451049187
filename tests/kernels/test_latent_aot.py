"""Kernels of latent rows compiled for real GPUs, without one: what they take."""

import pytest

from quantpage.ops.attend.latent.launch import MANY
from tests.kernels.aot import SHARED
from tests.kernels.apart import compile_apart

pytestmark = pytest.mark.cpu

# Bytes of a thread's stack, in what was measured on Hopper: words around the loop and some in it,
# which docs/latent.md counts. A change that adds to them has to be measured.
STACK = {
    "int8 16 0 90": 224,
    f"int8 16 {MANY + 1} 90": 232,
    "int8 128 0 90": 432,
    "fp8 128 0 90": 480,
    "none 128 0 90": 352,
}


@pytest.fixture(scope="module")
def compiled():
    """Compiled with the interpreter off, which this process may have on."""
    return compile_apart("tests.kernels.latent_case", "90", "80 89 100 120")


def test_every_target_has_the_shared_memory(compiled):
    attends = {name: takes for name, takes in compiled.items() if "shared" in takes}
    assert {int(name.split()[-1]) for name in attends} == set(SHARED)
    for name, takes in attends.items():
        assert takes["shared"] <= takes["limit"], name
        assert takes["counted"] >= takes["shared"], name
        assert takes["programs"] >= 1 and takes["products"] > 0, name
        assert takes["slow_conversions"] == 0, name


def test_stacks_stay_in_their_bounds(compiled):
    for name, takes in compiled.items():
        if "stack" in takes:
            assert takes["stack"] <= STACK.get(name, 48), name


def test_writes_and_gathers_keep_to_their_registers(compiled):
    found = {name: takes for name, takes in compiled.items() if "stack" not in takes}
    assert len(found) == 14 + 15
    for name, takes in found.items():
        most = 72 if name.startswith("write") else 128
        assert takes["spills"] == 0 and takes["registers"] <= most, name


def test_steps_of_any_length_take_the_same_kernels():
    """A server's prompts differ in length, and so do its drafts."""
    found = compile_apart("tests.kernels.latent_variants")
    assert len(found) == 6
    for name, kernels in found.items():
        assert kernels, name
        for kernel, variants in kernels.items():
            # Of drafts the first fills one tile of query rows, which is compiled in.
            assert variants <= 2, (name, kernel)
