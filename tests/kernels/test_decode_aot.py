"""Decode and write kernels compiled for real GPUs, without one: what they take."""

import pytest

from tests.kernels.aot import SHARED
from tests.kernels.apart import compile_apart
from tests.kernels.decode_case import OTHER_TARGETS

pytestmark = pytest.mark.cpu

# Instructions of the loop (its masked branch included) a byte of codes, warps counted: issue stops
# at 4 / this bytes a clock and multiprocessor, and an H200's memory delivers 18.
BUDGET = {"int8": 0.12, "fp8": 0.11, "int4": 0.165, "none": 0.05, "int6": 0.13, "int3": 0.24}


@pytest.fixture(scope="module")
def compiled():
    """Both processes compile with the interpreter off, which this one may have on."""
    return compile_apart("tests.kernels.decode_case", "90", "80 100 others")


def test_pages_of_float32_have_the_shared_memory(compiled):
    bounded = {name: takes for name, takes in compiled.items() if "limit" in takes}
    assert len(bounded) == 3
    for name, takes in bounded.items():
        assert takes["shared"] <= takes["limit"], name


def test_nothing_spills_and_no_byte_is_loaded_alone(compiled):
    for name, takes in compiled.items():
        if "float32" in name:
            continue
        # Decode kernels may spill a word around the loop, never inside.
        assert takes["spills"] == 0 and takes["stack"] <= 32, name
        assert takes["byte_loads"] == 0, name


def test_near_pages_of_codes_compile_for_every_target(compiled):
    near = {name: takes for name, takes in compiled.items() if name.startswith("decode near")}
    assert len(near) == 2 * len(SHARED)
    for name, takes in near.items():
        assert takes["wide_copies"] > 0 and takes["products"] > 0, name


@pytest.mark.parametrize("code", list(BUDGET))
def test_hopper_decode_stays_in_its_budget(compiled, code):
    takes = compiled[f"decode {code} 90"]
    assert takes["wide_copies"] > 0
    assert takes["narrow_code_copies"] == 0
    assert takes["products"] > 0
    assert takes["slow_conversions"] == 0
    assert takes["instructions_a_byte"] <= BUDGET[code]


def test_as_many_programs_fit_as_the_grid_has(compiled):
    for code in BUDGET:
        wanted = 3 if code == "none" else 8
        assert compiled[f"decode {code} 90"]["programs"] >= wanted


def test_every_target_compiles(compiled):
    for capability in (80, 90, 100):
        for code in BUDGET:
            assert f"decode {code} {capability}" in compiled
    for capability in OTHER_TARGETS:
        for code in ("int6", "int3"):
            assert f"decode {code} {capability}" in compiled
