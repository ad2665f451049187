"""What the Hopper decode kernel compiles to, without a GPU."""

import re

import pytest

from tests.kernels.apart import compile_apart, count
from tests.kernels.gluon_decode_case import CASES

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def compiled():
    """Name of a case -> its resources."""
    return compile_apart("tests.kernels.gluon_decode_case")


def in_loop(found: dict, pattern: str) -> int:
    return sum(1 for name in found["loop"] if re.match(pattern, name))


@pytest.mark.parametrize("name", list(CASES))
def test_nothing_spills_in_the_loop(compiled, name):
    """A word read back there waits for memory: the first-level cache is all shared memory."""
    found = compiled[name]
    assert in_loop(found, "LDL|STL") == 0
    assert in_loop(found, r"LDGSTS\.E\.BYPASS\.128") >= 4
    # Codes leave shared memory sixteen bytes or a unit of four at a time.
    assert in_loop(found, r"LDS\.[US]8") == 0


@pytest.mark.parametrize("name", ["int8 token", "int8 draft", "int4 draft"])
def test_keys_of_integers_are_multiplied_as_bytes(compiled, name):
    found = compiled[name]
    assert count(found, "IGMMA") >= 4 and count(found, "HGMMA") == 0
    assert in_loop(found, "HMMA") >= 8


def test_a_tile_waits_for_no_copy_under_way(compiled):
    """A proxy fence (MEMBAR) in the loop would; queries need one, before it."""
    for name, found in compiled.items():
        assert count(found, "MEMBAR") >= 1, name
        assert in_loop(found, "MEMBAR") == 0, name


def test_as_many_programs_fit_as_the_planner_wants(compiled):
    for name, wanted in (
        ("int8 token", 2),
        ("int8 token, four programs", 4),
        ("fp8 token, four programs", 4),
        ("int4 token, three programs", 3),
        ("int8 draft", 2),
        ("int8 of 256", 2),
    ):
        found = compiled[name]
        registers = -(-found["registers"] // 8) * 8
        fit = min(65536 // (registers * 128), 232448 // (found["shared"] + 1024))
        assert fit >= wanted, name
