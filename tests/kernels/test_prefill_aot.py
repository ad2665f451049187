"""What the prefill kernels compile to for GPUs that are not here."""

import pytest

from tests.kernels.apart import compile_apart, count

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def compiled():
    """Name of a case -> its resources."""
    return compile_apart("tests.kernels.prefill_case")


@pytest.mark.parametrize(
    "name",
    [
        "int8 sm_90", "fp8 sm_90", "int8 sm_100", "int6 sm_90", "int3 sm_90",
        "int6 keys, int4 values sm_90",
    ],
)  # fmt: skip
def test_pages_kernel_keeps_its_registers(compiled, name):
    found = compiled[name]
    assert found["stack"] == 0 and count(found, "LDL|STL") == 0
    assert count(found, "HGMMA|UTCHMMA") > 0
    # Codes are copied to shared memory 16 bytes at a time and never read from it one by one; what
    # is, are the bits of masked tiles: a key a thread.
    assert count(found, r"LDGSTS\.E\.BYPASS\.128") > 0
    assert count(found, r"LDS\.U8") <= 8


def test_values_are_looked_at_only_where_a_result_is_not_finite(compiled):
    """Of pages that may hold such values the masked tiles of the first walk take what they do in
    the second less the look at every value, and park nothing.
    """
    for name in ("workspace sm_90", "exact pages sm_90"):
        found = compiled[name]
        assert found["stack"] <= 16 and count(found, "LDL|STL") <= 8, name
        assert not [each for each in found["loop"] if each.startswith(("LDL", "STL"))], name
    assert len(compiled["exact pages sm_90"]["loop"]) <= 700


def test_int4_compiles_with_zero_points(compiled):
    assert compiled["int4 sm_90"]["stack"] <= 64
    assert count(compiled["int4 sm_90"], "HGMMA") > 0


@pytest.mark.parametrize("code", ["int6", "int3"])
def test_planes_cost_a_tile_what_four_bits_do(compiled, code):
    """What is loaded once stays in the threads that loaded it, and is stored in wide words."""
    found, four = (compiled[f"{each} sm_90"] for each in (code, "int4"))
    assert len(found["loop"]) <= 1.05 * len(four["loop"])
    assert count(found, r"STS\.U16") == 0
    # Elsewhere a few words are parked around the loop, as they are for four bits.
    for target in (80, 89, 100, 120):
        other = compiled[f"{code} sm_{target}"]
        assert count(other, "HMMA|UTCHMMA") > 0 and other["stack"] <= 96
    ampere = compiled[f"{code} sm_80"]["loop"]
    assert not [name for name in ampere if name.startswith(("LDL", "STL"))]


def test_int8_turns_four_codes_with_five_instructions(compiled):
    found = compiled["int8 sm_90"]
    # I2F is what Triton's own cast would be: one slow conversion a value.
    assert count(found, "I2F") <= 4


def test_every_card_has_the_shared_memory(compiled):
    bounded = [each for each in compiled.values() if "limit" in each]
    assert len(bounded) >= 13
    assert all(each["shared"] <= each["limit"] for each in bounded)


def test_ampere_uses_its_tensor_cores(compiled):
    assert count(compiled["int8 sm_80"], "HMMA") > 0
    assert count(compiled["int8 sm_80"], "LDL|STL") == 0


@pytest.mark.parametrize(
    "name",
    [
        "dense 128",
        "dense 64",
        "dense 256",
        "dense window, sinks",
        "dense carried",
        "dense exact",
        "dense exact, carried",
        "dense exact, window, sinks",
        "dense exact 256",
        "dense, output alone",
        "dense given scales",
    ],
)
def test_dense_kernel_is_wgmma_fed_by_tma(compiled, name):
    found = compiled[name]
    assert count(found, "HGMMA") > 0 and count(found, "UTMALDG") >= 2
    # Serialized wgmma shows as one arrive each; here one a matrix product, in two consumers.
    assert count(found, r"WARPGROUP\.ARRIVE") == 8
    assert count(found, "USETMAXREG") >= 3
    # Launch arguments may be parked once around the role switch, and a row's end has more of them
    # where scales are given, as a row's begin where its keys lie in two places; nothing of the
    # loop is.
    most = 80 if "exact" in name else 64 if "given" in name else 24
    assert count(found, "LDL|STL") <= most
    assert found["shared"] <= 227 * 1024


def test_softmax_runs_behind_the_product_of_values(compiled):
    """A consumer waits for: first scores, then in its loop scores and values, then last values.

    The loop's exponentials lie between its two waits; behind both, the tensor cores would idle.
    """
    loop = compiled["dense 128"]["loop"]
    waits = [at for at, name in enumerate(loop) if name.startswith("WARPGROUP.DEPBAR")]
    assert len(waits) == 8
    for first, scores, values, last in (waits[:4], waits[4:]):
        assert loop[first:scores].count("MUFU.EX2") >= 64
        assert loop[scores:values].count("MUFU.EX2") >= 64
        assert loop[values:last].count("MUFU.EX2") < 8


def test_little_stands_between_two_products_of_a_consumer(compiled):
    """Warps meet once a key tile, ask once whether a maximum moves, and jump over what follows if
    none does: exchanges of maxima behind the scores, rescaling behind the values."""
    for name in ("dense 128", "dense exact"):
        loop = compiled[name]["inner"]
        assert loop.count("BAR.SYNC.DEFER_BLOCKING") == 1
        assert loop.count("VOTE.ANY") == 1
        values = max(at for at, each in enumerate(loop) if each.startswith("WARPGROUP.DEPBAR"))
        last = max(at for at, each in enumerate(loop) if each == "FMUL")
        # A jump before the first of the 64, and with them nothing but they.
        assert "BRA" in loop[values : last - 62]
        assert loop[last - 63 : last + 1].count("FMUL") == 64


def test_queries_are_copied_ahead_and_outputs_leave_in_wide_words(compiled):
    """Queries by a copy as keys are, where a tile is whole tokens and memory has room; 16-bit
    outputs in 16 bytes a thread, by way of shared memory."""
    for name, copies in {
        "dense 128": 3,
        "dense 64": 3,
        "dense group 7": 2,
        "dense exact": 2,
    }.items():
        found = compiled[name]
        assert count(found, "UTMALDG") == copies, name
        wide = count(found, r"STG\.E\.128")
        assert wide == count(found, "STSM") >= 8 and count(found, "STG") - wide <= 4, name
    assert count(compiled["dense 256"], r"STG\.E\.128") == 0
