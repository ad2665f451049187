"""What the Hopper kernel of many query rows compiles to, without a GPU."""

import re

import pytest

from quantpage.ops.attend.decode.launch import PROGRAM_BYTES
from tests.kernels.apart import compile_apart, count
from tests.kernels.gluon_drafts_case import CASES, EXACT_CASES

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def compiled():
    """Name of a case -> its resources."""
    return compile_apart("tests.kernels.gluon_drafts_case")


def in_loop(found: dict, pattern: str) -> int:
    return sum(1 for name in found["inner"] if re.match(pattern, name))


@pytest.mark.parametrize("name", [*CASES, *EXACT_CASES])
def test_nothing_spills_in_the_loop(compiled, name):
    assert in_loop(compiled[name], "LDL|STL") == 0


@pytest.mark.parametrize("name", list(CASES))
def test_a_warp_of_its_own_copies(compiled, name):
    found = compiled[name]
    # By TMA, what a tile has of each of K and V: codes, and of tokens a scale and perhaps a zero.
    given = CASES[name]
    planes = 2 + sum(given.get("zero", (False, False))) if given.get("scales", 1) == 1 else 0
    assert count(found, "UTMALDG") == 2 + planes and count(found, "LDGSTS") == 0
    # Threads that multiply ask memory for nothing, and take sixteen bytes at a time.
    assert in_loop(found, "UTMALDG|LDG") == 0
    assert in_loop(found, r"LDS\.[US]8") == 0 and in_loop(found, r"LDS\.128") >= 2


@pytest.mark.parametrize("name", list(CASES))
def test_two_programs_fit_on_a_multiprocessor(compiled, name):
    found = compiled[name]
    # Two warpgroups each, of which one copies: the other takes most of its registers over.
    assert found["registers"] * 2 * 256 <= 65536 and found["shared"] <= PROGRAM_BYTES
    assert count(found, "USETMAXREG") > 0


@pytest.mark.parametrize("name", list(CASES))
def test_a_tile_has_no_more_barriers_than_it_needs(compiled, name):
    """One, those that Triton sets as it takes places of one buffer for the same, and one proxy
    fence, which would wait for loads on their way from memory.
    """
    assert in_loop(compiled[name], "BAR") <= 4
    assert in_loop(compiled[name], "MEMBAR") == 1


@pytest.mark.parametrize("name", list(EXACT_CASES))
def test_exact_pages_fit_in_the_place_of_a_program_of_the_body(compiled, name):
    found = compiled[name]
    assert found["registers"] * 128 <= 65536 // 2 and found["shared"] <= PROGRAM_BYTES
    # Keys and values of three tiles at first, then of one.
    assert count(found, "UTMALDG") == 2 * (3 + 1) and count(found, "LDGSTS") == 0
    assert in_loop(found, "HGMMA") == 8 + 4


def test_keys_are_multiplied_as_bytes_and_values_in_float16(compiled):
    for name, found in ((each, compiled[each]) for each in CASES):
        # In the loop and before it, each of the queries' two numbers: of 32 rows at once.
        once = CASES[name].get("rows") == 32
        assert count(found, "IGMMA") == (8 if once else 16) and count(found, "HGMMA") == 4
        assert count(found, "HMMA") == 0
