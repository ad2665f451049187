"""What the Hopper kernel of many query rows compiles to, without a GPU."""

import re

import pytest

from tests.kernels.apart import compile_apart, count
from tests.kernels.gluon_drafts_case import CASES

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def compiled():
    """Name of a case -> its resources."""
    return compile_apart("tests.kernels.gluon_drafts_case")


def in_loop(found: dict, pattern: str) -> int:
    return sum(1 for name in found["inner"] if re.match(pattern, name))


@pytest.mark.parametrize("name", list(CASES))
def test_nothing_spills_in_the_loop(compiled, name):
    found = compiled[name]
    # Beside exact pages there are a few words of scalars to read back.
    assert in_loop(found, "LDL|STL") <= (4 if name in ("int4", "k8v4") else 0)
    # Codes come by TMA, and leave shared memory sixteen bytes at a time.
    assert in_loop(found, "UTMALDG") >= 2 and count(found, "LDGSTS") == 0
    assert in_loop(found, r"LDS\.[US]8") == 0 and in_loop(found, r"LDS\.128|LDS\.64") >= 2


@pytest.mark.parametrize("name", list(CASES))
def test_two_programs_fit_on_a_multiprocessor(compiled, name):
    found = compiled[name]
    assert found["registers"] <= 255 and 2 * (found["shared"] + 1024) <= 233472


def test_a_tile_has_no_more_barriers_than_it_needs(compiled):
    """Two, and those that Triton sets between copies that one barrier counts, and before a wait."""
    for name, most in (("int8, scales given", 3), ("int8", 4), ("int4", 6)):
        assert in_loop(compiled[name], "BAR") <= most
        # One for each proxy fence, which would wait for scales on their way from memory.
        assert in_loop(compiled[name], "MEMBAR") == 2
        assert in_loop(compiled[name], "LDG") <= 1


def test_keys_are_multiplied_as_bytes_and_values_in_float16(compiled):
    for found in compiled.values():
        # In the loop and before it, each of the queries' two numbers.
        assert count(found, "IGMMA") == 16 and count(found, "HGMMA") == 4
        assert count(found, "HMMA") == 0
