"""The Hopper decode against the float64 reference; needs a GPU of compute capability 9.0."""

from dataclasses import replace
from itertools import product

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import (
    CAUSAL,
    DEVICE,
    HOPPER,
    HOPPER_FORMATS,
    ON_HOPPER,
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
from quantpage.formats import CODES, FORMATS, QuantSpec, find_format
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend import attend as attend_op
from quantpage.ops.attend.decode.launch import DecodeTiles
from quantpage.ops.attend.params import exact_pairs
from quantpage.ops.attend.reference import attend as reference
from tests.ops.segment_cases import make_segments, spoil

pytestmark = ON_HOPPER
if HOPPER:
    from quantpage.ops.attend.decode.gluon import attend

FEW = DecodeTiles(tile=64, warps=4, stages=3, programs_per_processor=2, wgmma=True)
MANY = replace(FEW, registers=128, drafts=True, rows=(64, 64))
HALF = replace(MANY, rows=(32, 64))
DRAFTS = Step((8, 1, 3), (700, 33, 150), page_size=64, head_dim=128)
GLUON = candidate("decode.gluon")


@pytest.fixture(params=[FEW, MANY, HALF], ids=["few rows", "many rows", "half of many"])
def tiles(request):
    """A shape of either kernel."""
    return request.param


def given_to(tiles, key, page_size):
    """Skips what the planner does not give to the kernel of many rows (launch.decode_tiles)."""
    if tiles.drafts and (page_size % tiles.tile or key.code.name == "fp8"):
        pytest.skip("pages of less than a tile, and keys of fp8, are read by the other kernel")


def check(key, value, step, *more, tiles, **options):
    if tiles is not None:
        given_to(tiles, key, step.page_size)
    check_decode(key, value, step, *more, tiles=tiles, run=attend, **options)


@pytest.mark.parametrize("name", [*HOPPER_FORMATS, "k=int8,v=fp8"])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_every_format_and_page_size(name, page_size, tiles):
    given = find_format(name)
    check(given.key, given.value, replace(DRAFTS, page_size=page_size), tiles=tiles)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int8_static"])
def test_head_dim_256(name):
    given = FORMATS[name]
    check(given.key, given.value, replace(DRAFTS, head_dim=256), tiles=FEW)


@pytest.mark.parametrize(
    "step",
    [
        Step((1, 1, 1), (70, 33, 1500), page_size=64, head_dim=128),
        Step((16, 16, 2), (300, 16, 950), page_size=64, head_dim=128),
        Step((3, 0, 2), (70, 0, 150), page_size=64, head_dim=128, group=7),
        Step((2, 1, 5), (2, 64, 90), page_size=64, head_dim=128, group=16),
        Step((16, 4, 1), (100, 4, 31), page_size=64, head_dim=128, group=8, kv_heads=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_groups_and_drafts(name, step, tiles):
    check(FORMATS[name].key, FORMATS[name].value, step, tiles=tiles)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "k8v4", "int4_static"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_windows_sinks_and_softcap(name, page_size, tiles):
    given = FORMATS[name]
    step = Step((3, 1, 2), (270, 33, 450), page_size=page_size, head_dim=128)
    mask = CausalMask(window=70, sink_tokens=3)
    check(given.key, given.value, step, mask, 5.0, sinks=True, tiles=tiles)
    check(given.key, given.value, step, CausalMask(window=1), tiles=tiles)
    check(given.key, given.value, step, CausalMask(window=64), sinks=True, tiles=tiles)


def test_full_mask_and_empty_requests(tiles):
    spec = FORMATS["int8"].key
    step = Step((2, 0, 3, 0), (40, 0, 150, 64), page_size=64, head_dim=128)
    check(spec, spec, step, FullMask(), sinks=True, tiles=tiles)
    check(spec, spec, replace(step, queries=(0, 0, 3, 0)), FullMask(), tiles=tiles)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 3e3])
@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_values_of_any_size(name, scale, tiles):
    given = FORMATS[name]
    wide = torch.float32 if scale < 1e-3 else torch.float16
    key, value = (replace(spec, scale_dtype=wide) for spec in (given.key, given.value))
    dtype = torch.float32 if scale < 1e-3 else None
    check(key, value, replace(DRAFTS, scale=scale), dtype=dtype, tiles=tiles)


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_rows_whose_peak_rises_with_every_tile(name, tiles):
    """The anchor has to follow: later keys score far above all before, by more than SLACK."""
    given = FORMATS[name]
    given_to(tiles, given.key, DRAFTS.page_size)
    q, layer, batch = make_step(given.key, given.value, DRAFTS, CAUSAL)
    scale = layer.key.scale
    # Pages of the longest request, in order: each twice the one before.
    for nth, page in enumerate(batch.page_table[0][: 700 // 64 + 1].tolist()):
        scale[page] = (scale[page] * 2.0**nth / 64).clamp_max(60000.0)
    params = AttendParams(q.shape[-1] ** -0.5)
    out, lse = attend(q, layer, batch, params, tiles=tiles)
    wanted, wanted_lse = reference(q.double(), layer, batch, params)
    assert relative(out, wanted) < 2 * TOLERANCE
    assert ((lse.cpu() - wanted_lse).abs() / wanted_lse.abs().clamp_min(1)).max() < 1e-3


def test_queries_of_any_size_side_by_side(tiles):
    """Heads thousands of times apart keep their own precision; a NaN stays in its row."""
    spec = FORMATS["int8"].key
    q, layer, batch = make_step(spec, spec, DRAFTS, CAUSAL)
    q = q.float() * torch.logspace(-4, 0, q.shape[1], device=DEVICE)[None, :, None]
    params = AttendParams(q.shape[-1] ** -0.5)
    out, _ = attend(q, layer, batch, params, tiles=tiles)
    wanted, _ = reference(q.double(), layer, batch, params)
    for head in range(q.shape[1]):
        assert relative(out[:, head], wanted[:, head]) < TOLERANCE
    q[2, 3, 5] = torch.nan
    broken, _ = attend(q, layer, batch, params, tiles=tiles)
    assert broken[2, 3].isnan().all()
    rest = torch.ones(q.shape[:2], dtype=torch.bool, device=DEVICE)
    rest[2, 3] = False
    assert torch.equal(broken[rest], out[rest])


@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_any_grid_gives_the_same_result(programs, name, tiles):
    given = FORMATS[name]
    tiles = replace(tiles, programs_per_processor=programs)
    check(given.key, given.value, DRAFTS, tiles=tiles)
    check(given.key, given.value, DRAFTS, tiles=replace(tiles, min_tiles=5))
    check(given.key, given.value, DRAFTS, tiles=replace(tiles, stages=2))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_step_of_one_request_has_a_plan_of_its_own(name, page_size, tiles):
    """Of any length, cut evenly or not, whole, and masked."""
    given = FORMATS[name]
    for new, context in ((1, 1), (2, 64), (1, 65), (3, 700), (1, 20_000)):
        step = Step((new,), (context,), page_size=page_size, head_dim=128)
        check(given.key, given.value, step, tiles=tiles)
        check(given.key, given.value, step, tiles=replace(tiles, min_tiles=5))
    window = CausalMask(window=130, sink_tokens=20)
    step = Step((3,), (20_000,), page_size=page_size, head_dim=128, kv_heads=3)
    check(given.key, given.value, step, window, sinks=True, tiles=tiles)


@pytest.mark.parametrize("new", [8, 16])
@pytest.mark.parametrize("mask", [CAUSAL, CausalMask(window=130, sink_tokens=20)], ids=str)
@pytest.mark.parametrize("name", ["int4", "k8v4", "int4_near8", "k8v4_near8"])
def test_segments_join_to_the_whole(name, mask, new):
    given = find_format(name)
    step = replace(DRAFTS, queries=(new, 1, 3))
    q, layer, batch = make_step(given.key, given.value, step, mask, exact=True, near=given.near)
    params = AttendParams(q.shape[-1] ** -0.5, mask, None, torch.randn(q.shape[1], device=DEVICE))
    out, lse = attend_op(q, layer, batch, params, GLUON)
    wanted, wanted_lse = reference(q.double(), layer, batch, params)
    assert relative(out, wanted) < TOLERANCE
    assert (lse.cpu() - wanted_lse).abs().max() < 1e-2


@pytest.mark.parametrize("windowed", [False, True])
def test_what_is_not_finite_in_exact_pages_reaches_only_those_who_see_it(windowed):
    """A NaN that later queries of a draft see, or that earlier ones saw, beside the others."""
    context, new = 5 * 64 + 4, 9
    mask = CausalMask(window=11) if windowed else CAUSAL
    step = Step((new,), (context,), page_size=64, head_dim=128)
    q, layer, batch = make_segments(FORMATS["int4"], step, mask)
    params = AttendParams(q.shape[-1] ** -0.5, mask)
    at = context - new // 2
    positions, keys = torch.arange(context - new, context), torch.arange(context)
    reads = (mask.materialize(positions, context) & exact_pairs(positions, keys, 64))[:, at]
    assert reads.any() and not reads.all()
    clean, clean_lse = attend_op(q, layer, batch, params, GLUON)
    assert clean.isfinite().all()
    for half, what in product(("key", "value"), (torch.nan, torch.inf)):
        out, lse = attend_op(q, spoil(layer, batch, at, what, half), batch, params, GLUON)
        assert torch.equal(out[~reads], clean[~reads]), (half, what)
        assert torch.equal(lse[~reads], clean_lse[~reads]), (half, what)
        # An infinite key may weigh nothing.
        if half == "value" or what != what:
            assert not out[reads].isfinite().flatten(1).all(1).any(), (half, what)


def test_pages_of_a_wider_cell_and_beyond_two_to_the_31(tiles):
    spec = QuantSpec(CODES["int8"])
    q, layer, batch = make_step(spec, spec, DRAFTS, CAUSAL)
    params = AttendParams(0.1)
    wanted, _ = attend(q, layer, batch, params, tiles=tiles)
    moved = in_a_wider_cell(layer, batch.page_size)
    assert torch.equal(attend(q, moved, batch, params, tiles=tiles)[0], wanted)
    moved, table = far_away(layer, batch)
    assert torch.equal(attend(q, moved, table, params, tiles=tiles)[0], wanted)


def test_a_graph_of_drafts_replays_with_new_lengths():
    step = Step((8,) * 5, (700, 33, 150, 9, 512), page_size=64, head_dim=128)
    check_replays(FORMATS["int8"], step, attend)


@pytest.mark.parametrize("requests", [40, 200])
def test_many_requests(requests):
    torch.manual_seed(1)
    contexts = tuple(torch.randint(4, 600, (requests,)).tolist())
    for name in ("int8", "int4"):
        given = FORMATS[name]
        step = Step((4,) * requests, contexts, 64, 1, 4, 128)
        check(given.key, given.value, step, tiles=None)
