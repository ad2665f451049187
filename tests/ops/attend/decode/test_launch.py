"""The decode plan's pure parts: row tiles, launch shapes, and who is refused why."""

from dataclasses import replace

import pytest
import torch

from quantpage.bench.cases import Case, make_batch, make_layer
from quantpage.formats import CODES, FORMATS, Granularity, KVFormat, QuantSpec
from quantpage.hardware import DeviceInfo
from quantpage.masks import CausalMask
from quantpage.ops.attend import CANDIDATES, AttendParams
from quantpage.ops.attend.decode.launch import (
    EXACT_ROWS,
    MAX_ROWS,
    decode_tiles,
    fitted,
    join_shape,
    joined_together,
    most_pieces,
    row_tiles,
)
from quantpage.ops.attend.decode.triton import in_boxes, planned
from quantpage.ops.dispatch import Call, choose
from quantpage.ops.refusals import (
    DECODE_GLUON,
    DECODE_TRITON,
    GATHER_TRITON,
    INTERVAL_TRITON,
    PREFILL_TRITON,
    WRITE_TRITON,
)
from tests.ops.triton_cases import GROUPED_FORMATS, HOPPER_FORMATS, KERNEL_FORMATS

pytestmark = pytest.mark.pure
H200 = DeviceInfo("cuda", "H200", (9, 0), 132)
CALL = Call(H200, FORMATS["int8"], torch.bfloat16, 32, 8, 128, 128, 64, "decode")


@pytest.mark.parametrize("group", [1, 4, 7, 16])
@pytest.mark.parametrize("new", [1, 2, 8, 16])
@pytest.mark.parametrize(("least", "most"), [(8, MAX_ROWS), (8, EXACT_ROWS), (64, 64)])
def test_row_tiles_cover_all_query_rows(group, new, least, most):
    rows, tiles = row_tiles(group, new, least, most)
    assert least <= rows <= most and rows & (rows - 1) == 0
    assert rows * tiles >= group * new > rows * (tiles - 1)


@pytest.mark.parametrize("name", HOPPER_FORMATS)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("new", [1, 4, 8, 16])
def test_many_query_rows_have_a_kernel_of_their_own_where_tma_reads_their_pages(name, group, new):
    given = FORMATS[name]
    rows, tiles_of_rows = row_tiles(group, new)
    for width in (128, 256):
        few = decode_tiles(given.key, given.value, width, rows, 10**6, tiles_of_rows, True)
        assert not few.drafts and few.rows == (8, MAX_ROWS)
        many = decode_tiles(given.key, given.value, width, rows, 10**6, tiles_of_rows, True, True)
        least = 16 if name == "k8v4" else 32
        assert many.drafts == (width == 128 and rows >= least and given.key.code.name != "fp8")
        if not many.drafts:
            assert many == few
            continue
        assert row_tiles(group, new, *many.rows) == (max(rows, 32), tiles_of_rows)
        # A ring of codes, scales and zeros, two tiles of values in float16 and of 4-bit keys as
        # bytes, queries, and what belongs to keys: twice on a multiprocessor.
        numbers = 2 * 16 + 16 + 4 + (2 * 8 if given.key.code.name == "int4" else 0)
        ring = many.stages * (given.key.code.bits + given.value.code.bits + 0.5)
        assert 2 * (ring + numbers + 1) <= 228 and many.stages >= 3
        assert 2 * many.registers * 256 <= 65536
        assert many.programs_per_processor == 2


@pytest.mark.parametrize("name", KERNEL_FORMATS)
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_every_call_has_a_launch(name, width, rows):
    given = FORMATS[name]
    for keys, parts in ((1000, 2), (10**7, 128), (10**7, 400), (10**7, 2000)):
        tiles = decode_tiles(given.key, given.value, width, rows, keys, parts)
        # Pages of 16 tokens and tiles of whole pages, or pages of whole tiles.
        assert tiles.tile in (32, 64) and tiles.programs_per_processor * tiles.warps <= 16
        assert not tiles.wgmma
        if width in (128, 256):
            tiles = decode_tiles(given.key, given.value, width, rows, keys, parts, wgmma=True)
            assert tiles.programs_per_processor * tiles.warps <= 16
            assert not tiles.wgmma or (tiles.tile, tiles.warps, tiles.gather) == (64, 4, 0)
            assert tiles.wgmma <= (name in HOPPER_FORMATS or name in GROUPED_FORMATS)
            # Drafts are what the Hopper kernel is for.
            if name in HOPPER_FORMATS and rows == 32:
                assert tiles.wgmma


def test_a_step_under_a_window_is_planned_by_the_keys_that_it_sees():
    layer = make_layer(Case(1, 64), "int4", "cpu").body()
    q, batch = torch.empty(16, 32, 128), make_batch(Case(16, 16384), False, "cpu")

    def tiles(window=None, sink_tokens=0, new=batch):
        params = AttendParams(0.1, CausalMask(window, sink_tokens))
        return planned(q, layer, new, params, "all", hopper=True)

    short = make_batch(Case(16, 512), False, "cpu")
    assert tiles(500) == tiles(new=short) != tiles()
    # Wider than any context, or with as many sinks: no key is counted twice.
    assert tiles(10**6) == tiles(500, 10**6) == tiles()


def test_exact_pages_of_drafts_have_a_kernel_of_their_own_where_tma_reads_them():
    params = AttendParams(0.1, CausalMask())

    def tiles(new=8, name="int4", hopper=True, dtype=None, **given):
        case = Case(2, 300, new=new, **given)
        layer = make_layer(case, name, "cpu").exact()
        if dtype is not None:
            key, value = (
                replace(half, codes=half.codes.to(dtype)) for half in (layer.key, layer.value)
            )
            layer = replace(layer, key=key, value=value)
        batch = make_batch(case, True, "cpu").exact_step()
        q = torch.empty(2 * new, case.q_heads, case.head_dim)
        return planned(q, layer, batch, params, "exact", hopper)

    assert tiles().drafts and tiles(16).drafts and tiles(8, "k8v4", page_size=128).drafts
    assert tiles(dtype=torch.float16) == tiles() == tiles(16)
    # Rows that one program of the Triton kernel holds; pages that it alone reads.
    for given in (
        {"new": 4}, {"name": "int4_near8"}, {"hopper": False}, {"dtype": torch.float32},
        {"page_size": 16}, {"head_dim": 64},
    ):  # fmt: skip
        assert not tiles(**given).wgmma and tiles(**given).whole, given


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "k8v4", "int8_static"])
def test_tma_copies_pages_of_whole_tiles_whose_places_it_can_name(name):
    def layer_of(page_size, heads=2):
        case = Case(2, 300, kv_heads=heads, page_size=page_size)
        made = make_layer(case, name, "cpu")
        return made if made.exact_key is None else made.body()

    assert in_boxes(layer_of(64)) and in_boxes(layer_of(128))
    assert not in_boxes(layer_of(16)) and not in_boxes(layer_of(96))
    layer = layer_of(64, 3)
    assert in_boxes(layer)
    # Of every other page, codes begin where TMA can; eight bytes later they do not.
    moved = replace(layer, key=replace(layer.key, codes=shifted(layer.key.codes, 16)))
    assert in_boxes(moved)
    moved = replace(layer, key=replace(layer.key, codes=shifted(layer.key.codes, 8)))
    assert not in_boxes(moved)
    if layer.value.spec.dynamic:
        moved = replace(layer, value=replace(layer.value, scale=shifted(layer.value.scale, 4)))
        assert not in_boxes(moved)


def shifted(tensor, count):
    """The same numbers ``count`` elements later in memory."""
    room = torch.empty(tensor.numel() + count, dtype=tensor.dtype)
    return room[count:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("kilobytes", [227, 163, 99], ids=["hopper", "ampere", "ada"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_pages_without_codes_fit_the_shared_memory_of_their_card(kilobytes, itemsize, width, rows):
    plain, limit = FORMATS["none"].key, kilobytes * 1024
    wanted = decode_tiles(plain, plain, width, rows, 10**7, 400)
    tiles = fitted(wanted, rows, width, itemsize, limit)
    padded = 1 << (width - 1).bit_length()
    # Queries, weights, and what is in flight: two of the stages are the page table's.
    numbers = rows * (padded + tiles.tile) + 2 * (tiles.stages - 2) * tiles.tile * padded
    assert tiles.tile >= 16 and tiles.stages >= 3
    assert itemsize * numbers <= limit or (rows, width, itemsize, kilobytes) == (64, 256, 4, 99)
    if kilobytes == 227 and itemsize == 2:
        # The shapes that were measured.
        assert tiles == wanted


def test_the_portable_kernels_serve_every_named_format_or_say_which_code_they_do_not_know():
    asked = (
        (DECODE_TRITON, {}),
        (PREFILL_TRITON, {"phase": "prefill"}),
        (INTERVAL_TRITON, {"mask": "interval"}),
        (WRITE_TRITON, {}),
        (GATHER_TRITON, {}),
    )
    for refusals, change in asked:
        for name, given in FORMATS.items():
            said = refusals(replace(CALL, format=given, **change))
            if name in GROUPED_FORMATS:
                said = [each for each in said if "needs one dynamic scale a token" not in each]
            assert bool(said) == (name not in KERNEL_FORMATS)
            assert all("codes of formats/spec for" in each for each in said)


@pytest.mark.parametrize(
    "change,said",
    [
        (
            {"phase": "prefill"},
            "needs the decode phase (at most 16 new tokens a request), got prefill.",
        ),
        ({"mask": "interval"}, "needs a causal or full mask, got interval."),
        ({"head_dim": 512}, "needs a head_dim up to 256, got 512."),
        ({"dtype": torch.float64}, "in float16, bfloat16 or float32, got float64."),
        ({"device": DeviceInfo("cpu", "a CPU", None, 2)}, "needs a CUDA device, got cpu."),
        ({"device": replace(H200, capability=(7, 5))}, "8.0 or later, got 7.5."),
        (
            {"format": KVFormat("g", *[QuantSpec(CODES["int8"], Granularity(group=32))] * 2)},
            "one dynamic scale a token and kv_head for keys, got 4.",
        ),
    ],
)
def test_decode_says_why_it_refuses(change, said):
    reasons = DECODE_TRITON(replace(CALL, **change))
    assert any(said in reason for reason in reasons)


def test_writes_of_uneven_groups_are_refused():
    odd = QuantSpec(CODES["int8"], Granularity(group=48))
    reasons = WRITE_TRITON(replace(CALL, format=KVFormat("g", odd, odd), head_dim=96))
    assert reasons and "got 48" in reasons[0]


def test_keys_that_are_rounded_in_turn_come_in_blocks_and_with_one_scale():
    turned = replace(CALL, in_turn=True)
    assert not WRITE_TRITON(CALL) and not WRITE_TRITON(turned)
    odd = replace(turned, head_dim=72, value_head_dim=72)
    assert WRITE_TRITON(odd) == [
        "needs a head_dim that is a multiple of 16 for a key map with feedback, got 72."
    ]
    grouped = QuantSpec(CODES["int8"], Granularity(group=32))
    form = KVFormat("g", grouped, grouped)
    assert not WRITE_TRITON(replace(CALL, format=form))
    assert WRITE_TRITON(replace(turned, format=form)) == [
        "needs one dynamic scale a token and kv_head for keys under a key map with feedback, got 4."
    ]


@pytest.mark.parametrize(
    "change,said",
    [
        ({"device": replace(H200, capability=(8, 0))}, "compute capability 9.0, got 8.0"),
        ({"format": FORMATS["none"]}, "needs codes, got keys as they come"),
        ({"format": FORMATS["int6"]}, "for keys, got int6 (-32 to 31 in torch.uint8)"),
        ({"head_dim": 64, "value_head_dim": 64}, "128 or 256, got 64 and 64"),
        ({"value_head_dim": 256}, "128 or 256, got 128 and 256"),
        ({"phase": "prefill"}, "got prefill"),
    ],
)
def test_the_hopper_kernel_says_what_it_needs(change, said):
    assert said in " ".join(DECODE_GLUON(replace(CALL, **change)))


@pytest.mark.parametrize("name", HOPPER_FORMATS)
def test_on_hopper_decode_is_named_after_the_kernel_that_runs(name):
    call = replace(CALL, format=FORMATS[name])
    assert choose(CANDIDATES, call).name == "gluon"
    assert choose(CANDIDATES, call, "triton").name == "triton"
    assert choose(CANDIDATES, replace(call, head_dim=64, value_head_dim=64)).name == "triton"


def test_pieces_of_a_row_are_joined_by_one_warp():
    """Sixteen at once, or 32 where rows have more and registers hold them."""
    for programs, all_rows in ((132, 8), (264, 64), (1056, 512), (396, 1024)):
        assert join_shape(programs, all_rows, 128) == (16, 1)
    for programs, all_rows in ((264, 12), (264, 8), (264, 1)):
        assert join_shape(programs, all_rows, 128) == (32, 1)
        assert join_shape(programs, all_rows, 256) == (16, 1)


def test_many_rows_of_few_pieces_are_joined_four_at_once():
    def together(lengths, new=1, programs=1056, group=4, width=128):
        rows, tiles_of_rows = row_tiles(group, new)
        all_rows = len(lengths) * 8 * tiles_of_rows
        pieces = most_pieces(programs, all_rows, lengths)
        return joined_together(pieces, all_rows, min(rows, group * new), width)

    uniform = (1024,) * 128
    assert together(uniform) == together((8192,) * 16, 16, 264) == 4
    # Steps of few rows, and of few query rows a kv_head; other widths.
    assert not together(uniform[:32]) and together(uniform[:64])
    assert not together(uniform, group=2) and not together(uniform, width=256)
    # One row has most of the step's keys, and so most of its programs: 100 pieces of 1,056.
    assert not together((100_000,) + (512,) * 63) and together((2048,) * 2 + (1024,) * 62)


def test_the_longest_row_has_its_share_of_the_programs():
    assert most_pieces(1056, 1024, (1024,) * 128) == 2
    assert most_pieces(264, 128, (8192,) * 16) == 3
    # 3 in 4 of the keys, and in two tiles of query rows on each of 8 kv_heads.
    assert most_pieces(1056, 512, (9300,) + (100,) * 31) == 1056 * 3 // 4 // 16 + 1
    assert most_pieces(264, 16, (0, 0)) == 1


def test_long_steps_of_few_rows_take_the_kernel_that_reads_faster():
    def hopper(name, keys, parts):
        given = FORMATS[name]
        tiles = decode_tiles(given.key, given.value, 128, 8, keys, parts, wgmma=True)
        return tiles.programs_per_processor if tiles.wgmma else 0

    million = 10**6
    assert [hopper("int8", keys * million, 256) for keys in (1, 2, 4)] == [2, 4, 4]
    assert [hopper(name, 2 * million, 256) for name in ("fp8", "k8v4", "int4")] == [0, 0, 0]
    assert [hopper(name, million, 256) for name in ("int8", "k8v4", "int4")] == [2, 3, 3]
    # int4: rows that no program begins two of, and more of them.
    assert hopper("int4", million // 3, 396) == 3 and hopper("int4", million // 3, 512) == 0


def test_four_tokens_of_k8v4_take_the_kernel_of_drafts_in_all_but_small_steps():
    def taken(name, keys, rows=16):
        given = FORMATS[name]
        found = decode_tiles(given.key, given.value, 128, rows, keys, 128, True, True)
        return found.drafts, found.programs_per_processor

    assert taken("k8v4", 10**6) == (True, 2) and taken("k8v4", 10**4) == (False, 3)
    assert not taken("int8", 10**6)[0] and not taken("int4", 10**6)[0]
    assert not taken("k8v4", 10**6, rows=8)[0]
