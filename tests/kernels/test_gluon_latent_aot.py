"""What the Hopper kernel of latent rows compiles to, without a GPU."""

import re

import pytest

from tests.kernels.aot import SHARED
from tests.kernels.apart import compile_apart, count
from tests.kernels.gluon_latent_case import CASES

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def compiled():
    """Name of a case -> its resources."""
    return compile_apart("tests.kernels.gluon_latent_case")


def in_loop(found: dict, pattern: str) -> int:
    return sum(1 for name in found["loop"] if re.match(pattern, name))


@pytest.mark.parametrize("name", list(CASES))
def test_a_tile_is_copied_and_read_in_wide_pieces(compiled, name):
    found = compiled[name]
    assert found["shared"] <= SHARED[90]
    # Words around the loop; two warpgroups' outputs and scores leave the loop short of some, as do
    # the two parts of fp8 keys that are multiplied and unpacked beside each other.
    most = 30 if "128" in name else 6 if "fp8" in name else 0
    assert in_loop(found, "LDL|STL") <= most
    assert in_loop(found, r"LDGSTS\.E\.BYPASS\.128") >= 9
    # Codes leave shared memory sixteen bytes or a word at a time.
    assert in_loop(found, r"LDS\.[US](8|16)") == 0


@pytest.mark.parametrize("name", ["int8 16", "int8 32", "int8 128", "int8 128 of prompts"])
def test_keys_of_integers_are_multiplied_as_bytes(compiled, name):
    found = compiled[name]
    # 576 channels, 32 at a time, as they leave shared memory for it, or lie there.
    assert in_loop(found, "IGMMA") == 18
    assert in_loop(found, "LDSM") == 0 if "128" in name else in_loop(found, "LDSM") >= 18


def test_values_are_multiplied_by_what_suits_the_rows(compiled):
    """Of 64 rows by the warpgroup's product, which needs a proxy fence (MEMBAR); of fewer by a
    warp's, without: a fence in the loop waits for every copy under way. Queries need one, before.
    """
    for name, found in compiled.items():
        if "128" in name:
            assert in_loop(found, "HGMMA") >= 16 and in_loop(found, "HMMA") == 0, name
            # Of them some wait for each other: of integer keys none but the tile's last.
            assert in_loop(found, "WARPGROUP") <= (17 if "int8" in name else 25), name
        else:
            assert in_loop(found, "HMMA") >= 64, name
            assert in_loop(found, "MEMBAR") == 0, name
        assert count(found, "MEMBAR") >= 1, name


def test_outputs_are_stored_in_wide_pieces(compiled):
    """Four neighbouring channels at once: eight threads fill whole sectors."""
    for name, found in compiled.items():
        assert count(found, r"STG\.E\.U16") == 0, name
        assert count(found, r"STG\.E\.(64|128)") >= 32, name


def test_long_steps_have_two_programs_a_multiprocessor(compiled):
    for code in ("int8", "fp8"):
        assert 2 * (compiled[f"{code} 16 of many keys"]["shared"] + 1024) <= SHARED[90] + 1024


def test_a_byte_takes_few_instructions(compiled):
    """Of 64 rows of 580 bytes by all warps, copies and softmax included."""
    for name, warps in (("int8 16", 4), ("fp8 16", 4), ("int8 32", 8)):
        assert len(compiled[name]["loop"]) * warps / (64 * 580) < 0.22, name
