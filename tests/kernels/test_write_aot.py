"""The write kernel compiled for sm_90 without a GPU: what it takes, and where its numbers lie."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.aot import SHARED

pytestmark = pytest.mark.cpu

# Of a program of two tiles of queries, or one of keys or of values, whatever the branch.
INSTRUCTIONS = {"none": 800, "fp8": 1500, "int8": 2300, "int4": 2700, "int4 mapped": 3400}
INSTRUCTIONS["int4 near int8"] = 4200
INSTRUCTIONS |= {"int6": 2800, "int3": 3100}

# A map of keys keeps a row's scales and means beside its numbers, and rows that are written twice
# are kept for the second time: at the cost of resident programs.
REGISTERS = {"int4 mapped": 144, "int4 near int8": 128}


def _compile(*words):
    """Compiled with the interpreter off, which this process may have on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-m", "tests.kernels.write_case", *words],
        env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600,
    )  # fmt: skip
    return json.loads(said.stdout)


@pytest.fixture(scope="module")
def compiled():
    """The kernel of every half and of keys without feedback."""
    return _compile()


def test_keys_in_turn_compile_for_every_target():
    found = _compile("turn")
    assert len(found) == len(SHARED) + 1
    for name, takes in found.items():
        assert takes["products"] > 0, name
        assert takes["shared"] <= SHARED[int(name.split()[-1])], name
        # A few words of what blocks have heard go to the stack.
        assert takes["stack"] <= 200, name
        # Blocks are a loop: unrolled they would not fit the cache of instructions.
        assert takes["instructions"] < 14000, name


def test_keys_in_lanes_compile_for_every_target():
    found = _compile("lanes")
    assert len(found) == len(SHARED) + 1
    for name, takes in found.items():
        assert takes["layout"], name
        assert takes["products"] > 0, name
        # A few words of what is kept while a body and near pages are written.
        assert takes["stack"] <= 200, name
        # Extremes of rows, and scales on their way to memory; while rows are rounded none.
        assert takes["moved"] <= 80, name


def test_matrices_of_key_maps_compile_for_every_target():
    found = _compile("matrix")
    assert len(found) == 2 * len(SHARED)
    for name, takes in found.items():
        assert takes["products"] > 0, name
        assert takes["shared"] <= SHARED[int(name.split()[-1])], name
        assert takes["stack"] == 0, name
        # The next tile comes while this one is multiplied, sixteen bytes a thread.
        assert takes["loads"] > 0, name


def test_products_find_the_layout_they_are_written_for(compiled):
    for name in ("int8", "int4", "int4 mapped", "int4 near int8", "int6", "int3"):
        assert compiled[name]["products"] > 0
        assert compiled[name]["layout"], name


def test_queries_are_rotated_without_shuffles(compiled):
    """What is left are the extremes of rows of keys and values."""
    for name in ("int8", "int4"):
        assert compiled[name]["shuffles"] <= 48, name


@pytest.mark.parametrize("name", list(INSTRUCTIONS))
def test_registers_and_instructions_stay_in_their_budget(compiled, name):
    assert compiled[name]["spills"] == 0
    assert compiled[name]["registers"] <= REGISTERS.get(name, 96)
    assert compiled[name]["instructions"] <= INSTRUCTIONS[name]
