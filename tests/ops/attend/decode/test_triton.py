"""The decode kernel against the float64 reference, in the interpreter or on a GPU."""

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import (
    CAUSAL,
    DEVICE,
    GPU,
    TIER,
    TOLERANCE,
    Step,
    candidate,
    check_decode,
    check_replays,
    far_away,
    in_a_wider_cell,
    make_step,
    relative,
)

# isort: split
import triton
import triton.language as tl

from quantpage.batch import derive
from quantpage.formats import CODES, FORMATS, Granularity, QuantSpec, find_format
from quantpage.hardware import DeviceInfo
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend import attend as attend_segments
from quantpage.ops.attend.decode import workspaces
from quantpage.ops.attend.decode.launch import DecodeTiles
from quantpage.ops.attend.decode.triton import Options, arrange, attend
from quantpage.ops.attend.decode.triton_cuts import merge_cuts_kernel
from quantpage.ops.attend.decode.triton_share import my_share
from quantpage.ops.attend.reference import attend as reference
from quantpage.ops.attend.results import results_for
from quantpage.ops.dispatch import Call
from quantpage.ops.refusals import DECODE_TRITON

pytestmark = TIER
SMALL = DecodeTiles(tile=32, warps=4, stages=3, programs_per_processor=1, gather=16)
check = partial(check_decode, tiles=SMALL)


@pytest.mark.parametrize("name", list(FORMATS))
def test_decode_reads_every_format(name):
    given = FORMATS[name]
    any_gpu = DeviceInfo("cuda", "a GPU", (9, 0), 1)
    reasons = DECODE_TRITON(Call(any_gpu, given, torch.float16, 8, 2, 64, 64, 16, "decode"))
    if reasons:
        pytest.skip(" ".join(reasons))
    check(given.key, given.value, Step())


# The interpreter takes a second a case: it gets the awkward width, and the widest once.
WIDTHS = [
    (name, width)
    for name in ("int8", "int4", "none", "int8_static", "int6", "int3")
    for width in (80, 96, 128, 256)
    # Of planes 128 channels are the first that fill a tile's places.
    if GPU or width == 80 or (name, width) in (("int8", 256), ("int6", 128), ("int3", 128))
]


@pytest.mark.parametrize("name,head_dim", WIDTHS)
def test_decode_takes_every_head_dim(name, head_dim):
    given = FORMATS[name]
    check(given.key, given.value, Step(head_dim=head_dim, contexts=(40, 5, 65)))


@pytest.mark.parametrize(
    "step",
    [
        Step(group=1),
        Step(group=7, queries=(3, 0, 2), contexts=(70, 0, 150)),
        Step(group=16, queries=(2, 1, 5), contexts=(2, 64, 90)),
        Step(group=4, queries=(16, 1, 7), contexts=(16, 33, 100), kv_heads=1),
        Step(group=8, queries=(16, 4, 1), contexts=(100, 4, 31), kv_heads=1),
        Step(value_dim=32),
        Step(head_dim=32, value_dim=64),
        Step(page_size=256, contexts=(70, 300, 1)),
    ],
    ids=str,
)
def test_decode_takes_groups_drafts_and_pages(step):
    check(FORMATS["int8"].key, FORMATS["int8"].value, step)


MASKED = ["int8", "int4", "int6", "int3"]
MASKED += ["fp8", "none", "fp8_static", "int4_static"] if GPU else []


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("page_size", [16, 64])
def test_windows_sinks_and_softcap(name, page_size):
    given = FORMATS[name]
    step = Step(queries=(3, 1, 2), contexts=(70, 33, 150), page_size=page_size)
    check(given.key, given.value, step, CausalMask(window=20, sink_tokens=3), 5.0, sinks=True)
    if GPU or (name, page_size) in (("int8", 16), ("int3", 64)):
        check(given.key, given.value, step, CausalMask(window=1))
        check(given.key, given.value, step, CausalMask(window=64), sinks=True)


@pytest.mark.parametrize("name", ["int6", "int3"])
@pytest.mark.parametrize(
    "step",
    [
        Step(group=7, queries=(3, 0, 2), contexts=(70, 0, 150)),
        Step(group=8, queries=(16, 4, 1), contexts=(100, 4, 31), kv_heads=1),
        Step(head_dim=32, value_dim=128, page_size=64),
        Step(head_dim=128, value_dim=16, contexts=(40, 5, 65)),
    ],
    ids=str,
)
def test_planes_of_groups_drafts_and_unlike_widths(name, step):
    given = FORMATS[name]
    check(given.key, given.value, step)


def test_full_mask_and_empty_requests():
    spec = FORMATS["int8"].key
    step = Step(queries=(2, 0, 3, 0), contexts=(40, 0, 150, 64))
    check(spec, spec, step, FullMask(), sinks=True)
    check(spec, spec, step, FullMask(), sinks=True, tiles=replace(SMALL, whole=True))
    check(spec, spec, replace(step, queries=(0, 0, 3, 0)), FullMask())


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 3e3])
@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_values_of_any_size(name, scale):
    given = FORMATS[name]
    wide = torch.float32 if scale < 1e-3 else torch.float16
    value = replace(given.value, scale_dtype=wide)
    key = replace(given.key, scale_dtype=wide)
    # A float32 query keeps the result from being rounded to float16's smallest numbers.
    check(key, value, Step(scale=scale), dtype=torch.float32 if scale < 1e-3 else None)


def test_queries_beyond_float16():
    spec = FORMATS["int8"].key
    q, layer, batch = make_step(spec, spec, Step(), CAUSAL)
    q = q.float() * 1e6
    params = AttendParams(q.shape[-1] ** -0.5 * 1e-6)
    out, _ = attend(q, layer, batch, params, tiles=SMALL)
    assert relative(out, reference(q.double(), layer, batch, params)[0]) < TOLERANCE


def test_a_request_without_context_gives_nothing():
    spec = FORMATS["int8"].key
    q, layer, batch = make_step(spec, spec, Step(), CAUSAL)
    # As a captured graph may leave it: lengths that moved on the device.
    lens = batch.context_lens.clone()
    lens[1] = 0
    out, lse = attend(q, layer, derive(batch, context_lens=lens), AttendParams(0.1), tiles=SMALL)
    assert (out[1] == 0).all() and lse[1].isneginf().all()
    assert out[0].isfinite().all() and out[2].isfinite().all()


@pytest.mark.parametrize("programs", [1, 5])
def test_any_grid_gives_the_same_result(programs):
    spec = FORMATS["fp8"].key
    check(spec, spec, Step(), tiles=replace(SMALL, whole=True, gather=0))
    check(spec, spec, Step(), tiles=replace(SMALL, programs_per_processor=programs))
    check(spec, spec, Step(), tiles=replace(SMALL, programs_per_processor=programs, min_tiles=2))
    check(spec, spec, Step(), tiles=replace(SMALL, programs_per_processor=programs, gather=0))


@pytest.mark.parametrize("queries", [(1,), (1, 1), (3, 1, 0)], ids=str)
def test_rows_of_many_pieces_are_joined_in_groups(queries):
    spec = FORMATS["int8"].key
    step = Step(queries, (300, 170, 9)[: len(queries)], kv_heads=1)
    tiles = replace(SMALL, tile=16, programs_per_processor=5, gather=4)
    for gather in (2, 4, 0):
        check(spec, spec, step, tiles=replace(tiles, gather=gather))
        # The next launch, or a replayed graph, counts from where this one began.
        assert not any(kept.any() for each in workspaces._counters.values() for kept in each)


@pytest.mark.parametrize("heads,even", [(1, True), (2, True), (20, False)])
def test_a_join_of_one_request_knows_where_its_pieces_are(heads, even):
    """Where rows are cut evenly it reads nothing that says so; else what the programs left."""
    spec = FORMATS["int8"].key
    tiles = replace(SMALL, tile=16, programs_per_processor=5, gather=0)
    q, layer, batch = make_step(spec, spec, Step((2,), (300,), kv_heads=heads), CAUSAL)
    params = AttendParams(0.1)
    wanted, _ = attend(q, layer, batch, params, tiles=tiles)
    results = results_for(q, layer.value.head_dim, final=True)
    results.out.fill_(torch.nan)
    made = arrange(results, q, layer, batch, params, Options(tiles=tiles))
    grid, given, fixed = made.merge
    # The pieces of the launch above are where this one's would be.
    cuts = given[0]
    cut = (cuts[: 2 * heads : 2] >= 0).repeat_interleave(q.shape[1] // heads)
    assert cut.any() and (cut.all() or not even)
    if even:
        cuts.fill_(-1)
    merge_cuts_kernel[grid](*given, **fixed | {"ONE": tiles.tile})
    assert torch.equal(results.out[:, cut], wanted[:, cut])
    assert results.out[:, ~cut].isnan().all()


@pytest.mark.parametrize(
    "key,value",
    [
        ("int8", "int4"), ("none", "int8"), ("int4", "none"), ("int6", "int4"), ("int4", "int6"),
        ("int8", "int3"), ("int6", "int3"), ("int3", "fp8"), ("none", "int6"), ("int3", "none"),
    ],
)  # fmt: skip
def test_keys_and_values_of_different_codes(key, value):
    check(QuantSpec(CODES[key]), QuantSpec(CODES[value]), Step())


def test_static_scales_of_a_tensor_and_of_groups():
    tensor = QuantSpec(CODES["fp8"], Granularity(per_head=False), dynamic=False)
    check(tensor, tensor, Step())
    groups = QuantSpec(CODES["int8"], Granularity(group=16), dynamic=False, zero_point=True)
    check(groups, groups, Step(), sinks=True)
    for code in ("int6", "int3"):
        channels = QuantSpec(CODES[code], Granularity(group=1), dynamic=False, zero_point=True)
        check(channels, channels, Step(), sinks=True)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("mask", [CAUSAL, CausalMask(window=30, sink_tokens=20)], ids=str)
@pytest.mark.parametrize(
    "name,joins",
    [("int4", False), ("int4", True), ("int4_near8", True), ("k=fp8,v=int4_near8", True)],
)
def test_segments_join_to_the_whole(page_size, mask, name, joins):
    from quantpage.ops.attend import attend as attend_op
    from quantpage.ops.dispatch import Implementation

    given = find_format(name)
    step = Step(queries=(3, 1, 2), contexts=(70, 9, 130), page_size=page_size)
    q, layer, batch = make_step(given.key, given.value, step, mask, exact=True, near=given.near)
    sinks = torch.randn(q.shape[1], device=DEVICE)
    params = AttendParams(q.shape[-1] ** -0.5, mask, None, sinks)
    ours = Implementation(
        "triton", "quantpage.ops.attend.decode.triton:attend", lambda call: [], joins=joins
    )
    out, lse = attend_op(q, layer, batch, params, ours)
    wanted, wanted_lse = reference(q.double(), layer, batch, params)
    assert relative(out, wanted) < TOLERANCE
    assert (lse.cpu() - wanted_lse).abs().max() < 1e-2


def test_pages_of_a_wider_cell():
    """An engine may keep K and V codes of a (page, head) side by side."""
    spec = FORMATS["int8"].key
    q, layer, batch = make_step(spec, spec, Step(), CAUSAL)
    params = AttendParams(0.1)
    wanted, _ = attend(q, layer, batch, params, tiles=SMALL)
    moved = in_a_wider_cell(layer, batch.page_size)
    assert torch.equal(attend(q, moved, batch, params, tiles=SMALL)[0], wanted)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_bfloat16_queries_and_pages():
    for name in ("none", "int8", "fp8", "int4"):
        given = FORMATS[name]
        check(given.key, given.value, Step(head_dim=128), dtype=torch.bfloat16, tolerance=8e-3)


@pytest.mark.skipif(not GPU, reason="shared memory is a card's")
@pytest.mark.parametrize("head_dim", [80, 128, 256])
def test_exact_pages_of_float32_fit_into_shared_memory(head_dim):
    """Sixteen tokens of a group of four are 64 query rows, the most that a tile has."""
    given, step = FORMATS["k8v4"], Step((16, 3), (80, 300), page_size=16, head_dim=head_dim)
    q, layer, batch = make_step(given.key, given.value, step, CAUSAL, torch.float32, exact=True)
    params = AttendParams(head_dim**-0.5)
    run = candidate("decode.triton")
    out, _ = attend_segments(q, layer, batch, params, run)
    wanted, _ = reference(q.double(), layer, batch, params)
    # Beside codes the queries are rounded to float16, too: 1.3e-3 on an H100.
    assert relative(out, wanted) < 2 * TOLERANCE


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_graph_replays_with_new_lengths():
    step = Step(queries=(1,) * 5, contexts=(700, 33, 150, 1, 512), head_dim=128, page_size=64)
    check_replays(FORMATS["int8"], step)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_caches_beyond_two_to_the_31():
    """Page offsets are int64: the pages in use lie past 2^31 elements."""
    spec = QuantSpec(CODES["int8"])
    step = Step(queries=(1,), contexts=(200,), head_dim=128, page_size=64)
    q, layer, batch = make_step(spec, spec, step, CAUSAL)
    params = AttendParams(0.1)
    wanted, _ = attend(q, layer, batch, params)
    moved, table = far_away(layer, batch)
    assert torch.equal(attend(q, moved, table, params)[0], wanted)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("requests", [100, 700])
def test_many_requests(requests):
    torch.manual_seed(1)
    contexts = tuple(torch.randint(1, 300, (requests,)).tolist())
    spec = FORMATS["int8"].key
    check(spec, spec, Step((1,) * requests, contexts, 64, 1, 4, 64), tiles=None)


@triton.jit(do_not_specialize=["requests", "heads", "min_tiles"])
def _shares(starts, lens, out, requests, heads, min_tiles, CHUNK: tl.constexpr, LEAD: tl.constexpr):
    start, end, share, request, begins, even = my_share(
        starts, lens, requests, heads, min_tiles, 0, 0, 64, 32, False, False, 0, CHUNK, LEAD
    )
    at = out + tl.program_id(0) * 6
    tl.store(at, start)
    tl.store(at + 1, end)
    tl.store(at + 2, share)
    tl.store(at + 3, request)
    tl.store(at + 4, begins)
    tl.store(at + 5, even.to(tl.int32))


@pytest.mark.parametrize("seed", range(30 if GPU else 10))
def test_shares_hold_every_tile_once(seed):
    """Straddling or even: programs walk their tiles as the kernel does."""
    choice = random.Random(seed)
    requests, heads = choice.choice([1, 2, 5, 40]), choice.choice([1, 2, 8])
    longest, programs = choice.randint(1, 3000), choice.choice([3, 40, 132])
    lead = choice.choice([0, 2])
    equal = choice.random() < 0.5
    lens = [longest if equal else choice.randint(0, longest) for _ in range(requests)]
    starts = torch.tensor([0, *itertools.accumulate(min(n, 1) for n in lens)], dtype=torch.int32)
    out = torch.zeros(programs, 6, dtype=torch.int32, device=DEVICE)
    given = (starts.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE), out)
    _shares[(programs,)](
        *given, requests, heads, choice.choice([1, 2]), 32 if requests < 32 else 128, lead
    )
    tiles = [-(-n // 32) for n in lens]
    seen = []
    for position, end, _, request, begins, even in out.tolist():
        before = 0 if even else lead
        while position < end:
            whole = tiles[request] + before * (tiles[request] > 0)
            row, at = divmod(position - begins, max(whole, 1))
            first, last = max(at - before, 0), min(tiles[request], at + end - position - before)
            seen += [(request, row, tile) for tile in range(first, last)]
            position += whole - at
            if position - begins >= whole * heads:
                request, begins = request + 1, position
    assert sorted(seen) == [
        (request, row, tile)
        for request, count in enumerate(tiles)
        for row in range(heads)
        for tile in range(count)
    ]
    if equal and tiles[0] * heads * requests < programs:
        assert all(even for *_, even in out.tolist())
