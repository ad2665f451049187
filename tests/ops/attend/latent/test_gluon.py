"""The Hopper kernel of latent rows against the float64 reference; needs compute capability 9.0."""

from dataclasses import replace

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import (
    CAUSAL,
    DEVICE,
    HOPPER,
    ON_HOPPER,
    TOLERANCE,
    Step,
    assert_agrees,
    make_step,
    relative,
)

# isort: split
from quantpage.batch import derive
from quantpage.formats import CODES, QuantSpec
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.latent.launch import LatentTiles
from quantpage.ops.attend.reference import attend as reference

pytestmark = ON_HOPPER
if HOPPER:
    from quantpage.ops.attend.latent.gluon import attend

FEW = LatentTiles(16, 64, 4, 3, wgmma=True, min_tiles=1)
MANY = LatentTiles(64, 64, 8, 3, wgmma=True, min_tiles=1)
TWO = LatentTiles(16, 64, 4, 2, programs_per_processor=2, wgmma=True, min_tiles=1)
SHAPES = pytest.mark.parametrize("tiles", [FEW, TWO, MANY], ids=["few", "two", "many"])
CODE = pytest.mark.parametrize("code", ["int8", "fp8"])
RANK, ROTARY = 512, 64


def make(code, step, mask=CAUSAL, dtype=torch.float16):
    """q, layer and plan; heads are the step's group."""
    spec = QuantSpec(CODES[code])
    step = replace(step, kv_heads=1, head_dim=RANK, value_dim=ROTARY)
    q, layer, batch = make_step(spec, spec, step, mask, dtype)
    q = torch.randn(q.shape[0], step.group, RANK + ROTARY, device=DEVICE).to(q.dtype)
    return q, replace(layer, latent=True), batch


def check(code, step, tiles, mask=CAUSAL, softcap=None, sinks=False, dtype=torch.float16):
    q, layer, batch = make(code, step, mask, dtype)
    sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, mask, softcap, sink)
    out, lse = attend(q, layer, batch, params, tiles=tiles)
    wanted = reference(q.double(), layer, batch, params)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:2], RANK)
    assert_agrees(out, lse, *wanted, TOLERANCE, 10 * TOLERANCE)


@SHAPES
@CODE
@pytest.mark.parametrize("page_size", [16, 128])
def test_every_page_size(code, page_size, tiles):
    check(code, Step(group=16, contexts=(70, 33, 1500), page_size=page_size), tiles)


# What is compiled of its own takes a GPU seconds each.
@pytest.mark.parametrize(
    "step,code,tiles",
    [
        (Step(group=1, page_size=64), "int8", FEW),
        (Step((3, 0, 2), (70, 0, 150), 64, group=20), "int8", MANY),
        (Step((3, 0, 2), (70, 0, 150), 64, group=20), "fp8", FEW),
        (Step((1, 1), (65, 1020), 64, group=128), "int8", FEW),
        (Step((1, 1), (65, 1020), 64, group=128), "fp8", MANY),
        (Step((4, 1, 16), (20, 64, 390), 64, group=16), "int8", MANY),
        (Step((4, 1, 16), (20, 64, 390), 64, group=16), "fp8", FEW),
    ],
    ids=str,
)
def test_heads_and_drafts(step, code, tiles):
    check(code, step, tiles)


@pytest.mark.parametrize(
    "step,code,tiles",
    [
        (Step((40, 1, 0, 33), (170, 900, 0, 33), 64, group=16), "int8", MANY),
        (Step((40, 1, 0, 33), (170, 900, 0, 33), 16, group=20), "fp8", MANY),
        (Step((20, 3), (1000, 33), 64, group=128), "int8", MANY),
        (Step((20, 3), (1000, 33), 64, group=128), "fp8", MANY),
        (Step((17, 1), (9000, 40), 64, group=16), "int8", MANY),
        (Step((25,), (1500,), 64, group=1), "int8", FEW),
        (Step((300,), (300,), 64, group=16), "int8", None),
    ],
    ids=str,
)
def test_prompts(step, code, tiles):
    """Rows that begin within a token, of requests of any length; those of 9,000 keys are cut."""
    check(code, step, tiles)


@CODE
def test_prompts_under_every_mask(code):
    step = Step(group=16, queries=(60, 1, 25), contexts=(470, 33, 2150), page_size=64)
    check(code, step, MANY, CausalMask(window=70, sink_tokens=3), 5.0, sinks=True)
    check(code, step, MANY, FullMask(), sinks=True)


@SHAPES
@CODE
def test_windows_sinks_and_softcap(code, tiles):
    step = Step(group=16, queries=(3, 1, 2), contexts=(270, 33, 450), page_size=64)
    check(code, step, tiles, CausalMask(window=70, sink_tokens=3), 5.0, sinks=True)
    check(code, step, tiles, FullMask(), sinks=True)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_of_other_dtypes(dtype, tiles):
    q, layer, batch = make("int8", Step(group=16, page_size=64))
    q, params = q.to(dtype) * 1e6, AttendParams(q.shape[-1] ** -0.5 * 1e-6)
    out, lse = attend(q, layer, batch, params, tiles=tiles)
    wanted, wanted_lse = reference(q.double(), layer, batch, params)
    assert out.dtype == dtype
    assert relative(out, wanted) < (6e-3 if dtype == torch.bfloat16 else TOLERANCE)
    assert (lse.cpu() - wanted_lse).abs().max() < 1e-2


@SHAPES
@CODE
def test_rows_whose_peak_rises_with_every_tile(code, tiles):
    """The anchor has to follow: later keys score far above all before, by more than SLACK."""
    q, layer, batch = make(code, Step(group=16, contexts=(700, 33, 150), page_size=64))
    scale = layer.key.scale
    # Pages of the longest request, in order: each twice the one before.
    for nth, page in enumerate(batch.page_table[0][: 700 // 64 + 1].tolist()):
        scale[page] = (scale[page] * 2.0**nth / 64).clamp_max(60000.0)
    params = AttendParams(q.shape[-1] ** -0.5)
    out, lse = attend(q, layer, batch, params, tiles=tiles)
    wanted, wanted_lse = reference(q.double(), layer, batch, params)
    assert relative(out, wanted) < 2 * TOLERANCE
    assert ((lse.cpu() - wanted_lse).abs() / wanted_lse.abs().clamp_min(1)).max() < 1e-3


@SHAPES
@CODE
def test_a_query_that_is_not_finite_is_nan_and_no_other(code, tiles):
    q, layer, batch = make(code, Step(group=16, page_size=64))
    q[1, 3, 7] = torch.inf
    out, _ = attend(q, layer, batch, AttendParams(0.1), tiles=tiles)
    bad = ~out.isfinite().all(-1)
    assert bad[1, 3] and bad.sum() == 1


@SHAPES
def test_a_request_without_context_gives_nothing(tiles):
    q, layer, batch = make("int8", Step(group=16, page_size=64))
    # As a captured graph may leave it: lengths that moved on the device.
    lens = batch.context_lens.clone()
    lens[1] = 0
    out, lse = attend(q, layer, derive(batch, context_lens=lens), AttendParams(0.1), tiles=tiles)
    assert (out[1] == 0).all() and lse[1].isneginf().all()
    assert out[0].isfinite().all() and out[2].isfinite().all()


@SHAPES
@CODE
@pytest.mark.parametrize("programs", [1, 3])
def test_any_grid_gives_the_same_result(programs, code, tiles):
    step = Step(group=16, contexts=(700, 33, 150), page_size=64)
    check(code, step, replace(tiles, programs_per_processor=programs))
    check(code, step, replace(tiles, programs_per_processor=programs, min_tiles=5))


@CODE
@pytest.mark.parametrize("sinks", [False, True])
def test_few_pieces_are_joined_by_the_last_program(code, sinks):
    """Of forty rows; twice, as counters have to be zeros again, and some without keys."""
    contexts = tuple(9000 if i == 7 else 33 + 29 * i for i in range(40))
    step = Step(group=16, queries=(1,) * 40, contexts=contexts, page_size=64)
    q, layer, batch = make(code, step)
    sink = torch.randn(16, device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, sinks=sink)
    wanted = reference(q.double(), layer, batch, params)
    for _ in range(3):
        out, lse = attend(q, layer, batch, params, tiles=FEW)
        assert_agrees(out, lse, *wanted, TOLERANCE, 10 * TOLERANCE)
    lens = batch.context_lens.clone()
    lens[3:5] = 0
    out, lse = attend(q, layer, derive(batch, context_lens=lens), params, tiles=FEW)
    assert (out[3:5] == 0).all()
    assert torch.allclose(lse[3:5], sink.expand(2, -1)) if sinks else lse[3:5].isneginf().all()
    rest = [i for i in range(40) if i not in (3, 4)]
    wanted_out, wanted_lse = (each[rest] for each in wanted)
    assert_agrees(out[rest], lse[rest], wanted_out, wanted_lse, TOLERANCE, 10 * TOLERANCE)


def test_pages_side_by_side_and_a_replayed_graph():
    q, layer, batch = make("int8", Step(group=16, contexts=(700, 33, 150), page_size=64))
    params = AttendParams(q.shape[-1] ** -0.5)
    scattered = [
        replace(half, codes=torch.cat([half.codes, half.codes], 2)[:, :, :64])
        for half in (layer.key, layer.value)
    ]
    wide = replace(layer, key=scattered[0], value=scattered[1])
    assert not wide.key.codes.is_contiguous()
    wanted = reference(q.double(), layer, batch, params)
    out, lse = attend(q, wide, batch, params)
    assert_agrees(out, lse, *wanted, TOLERANCE, 10 * TOLERANCE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(q, wide, batch, params)
    for shorter in (0, 13, 30):
        lens = [context - shorter for context in (700, 33, 150)]
        batch.context_lens.copy_(torch.tensor(lens))
        graph.replay()
        late = torch.tensor(lens, device=DEVICE) - 1
        now = replace(batch, host_context_lens=tuple(lens), positions=late)
        wanted = reference(q.double(), layer, now, params)
        assert_agrees(out, lse, *wanted, TOLERANCE, 10 * TOLERANCE)


@pytest.mark.parametrize(
    "code,heads,queries",
    [
        ("int8", 16, 1),
        ("int8", 16, 4),
        ("int8", 32, 1),
        ("int8", 128, 4),
        ("fp8", 16, 2),
        ("fp8", 128, 1),
    ],
)
def test_the_planners_shapes(code, heads, queries):
    step = Step(group=heads, queries=(queries, 1, 1), contexts=(4100, 33, 900), page_size=64)
    check(code, step, None)
