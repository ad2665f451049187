"""Kernels of latent rows (MLA) against the float64 reference, in the interpreter or on a GPU."""

from dataclasses import replace

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
    assert_agrees,
    make_step,
    relative,
)

# isort: split
from quantpage.batch import derive
from quantpage.formats import CODES, FORMATS, QuantSpec
from quantpage.hardware import DeviceInfo
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.latent.launch import LatentTiles
from quantpage.ops.attend.latent.triton import attend
from quantpage.ops.attend.reference import attend as reference
from quantpage.ops.dispatch import Call
from quantpage.ops.refusals import LATENT_TRITON

pytestmark = TIER
BY_KEYS = LatentTiles(16, 32, 2, 3, by_keys=True, min_tiles=1)
BY_ROWS = LatentTiles(64, 32, 8, 2, min_tiles=1)
SHAPES = pytest.mark.parametrize("tiles", [BY_KEYS, BY_ROWS], ids=["keys", "rows"])
NONE, INT8, FP8 = (QuantSpec(CODES[name]) for name in ("none", "int8", "fp8"))
PAIRS = {
    "none": (NONE, NONE),
    "int8": (INT8, INT8),
    "fp8": (FP8, FP8),
    "int8 fp8": (INT8, FP8),
    "fp8 none": (FP8, NONE),
}
RANK, ROTARY = 96, 32


def make(pair, step, mask=CAUSAL, dtype=torch.float16, rank=RANK, rotary=ROTARY):
    """q, layer and plan; heads are the step's group."""
    step = replace(step, kv_heads=1, head_dim=rank, value_dim=rotary)
    q, layer, batch = make_step(*PAIRS[pair], step, mask, dtype)
    q = torch.randn(q.shape[0], step.group, rank + rotary, device=DEVICE).to(q.dtype)
    return q, replace(layer, latent=True), batch


def served(pair, tiles):
    """Skip what keys by queries is never asked for: rows without codes."""
    if tiles.by_keys and not all(spec.quantized for spec in PAIRS[pair]):
        pytest.skip("keys by queries reads codes alone")


def check(pair, step, tiles, mask=CAUSAL, softcap=None, sinks=False, **shape):
    q, layer, batch = make(pair, step, mask, **shape)
    sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, mask, softcap, sink)
    out, lse = attend(q, layer, batch, params, tiles=tiles)
    wanted = reference(q.double(), layer, batch, params)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:2], layer.key.head_dim)
    assert_agrees(out, lse, *wanted, TOLERANCE, 10 * TOLERANCE)


# What is compiled of its own takes a GPU seconds each: pages that are shorter than a tile of every
# format, those that hold a tile of one with scales and of one without.
@SHAPES
@pytest.mark.parametrize(
    "pair,page_size", [*((each, 16) for each in PAIRS), ("int8", 64), ("none", 64)]
)
def test_every_format_and_page_size(pair, page_size, tiles):
    served(pair, tiles)
    check(pair, Step(group=16, contexts=(70, 33, 150), page_size=page_size), tiles)


@SHAPES
@pytest.mark.parametrize(
    "step",
    [
        Step(group=1),
        Step(group=20, queries=(3, 0, 2), contexts=(70, 0, 150)),
        Step(group=128, queries=(1, 1), contexts=(65, 20)),
        *([] if GPU else [Step(group=16, queries=(4, 1, 16), contexts=(20, 64, 90))]),
        *([] if GPU else [Step(group=6, queries=(5,), contexts=(5,), page_size=32)]),
    ],
    ids=str,
)
def test_heads_and_drafts(step, tiles):
    check("int8", step, tiles)


@SHAPES
@pytest.mark.parametrize("pair", ["int8", "none"])
def test_windows_sinks_and_softcap(pair, tiles):
    served(pair, tiles)
    step = Step(group=16, queries=(3, 1, 2), contexts=(70, 33, 150))
    check(pair, step, tiles, CausalMask(window=20, sink_tokens=3), 5.0, sinks=True)
    check(pair, step, tiles, FullMask(), sinks=True)


@SHAPES
def test_a_whole_deepseek_row(tiles):
    step = Step(group=16, queries=(1, 2), contexts=(33, 70))
    for pair in ("int8",) if tiles.by_keys else ("int8", "none"):
        check(pair, step, tiles, rank=512, rotary=64)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_of_other_dtypes(dtype, tiles):
    q, layer, batch = make("int8", Step(group=16))
    q, params = q.to(dtype) * 1e6, AttendParams(q.shape[-1] ** -0.5 * 1e-6)
    out, lse = attend(q, layer, batch, params, tiles=tiles)
    wanted, wanted_lse = reference(q.double(), layer, batch, params)
    assert out.dtype == dtype
    # The interpreter cuts off what it does not store of a bfloat16.
    assert relative(out, wanted) < (6e-3 if dtype == torch.bfloat16 else TOLERANCE)
    assert (lse.cpu() - wanted_lse).abs().max() < 1e-2


@pytest.mark.skipif(not GPU, reason="the interpreter multiplies the bits of a bfloat16")
def test_bfloat16_pages():
    q, layer, batch = make("none", Step(group=16), dtype=torch.bfloat16)
    params = AttendParams(q.shape[-1] ** -0.5)
    out, _ = attend(q, layer, batch, params, tiles=BY_ROWS)
    assert relative(out, reference(q.double(), layer, batch, params)[0]) < 6e-3


def test_a_row_that_is_not_finite_reaches_those_who_see_it_alone():
    q, layer, batch = make("none", Step(group=16, queries=(3,), contexts=(40,)))
    page = batch.page_table[0, 39 // 16]
    layer.key.codes[page, 0, 39 % 16, 5] = torch.inf
    out, _ = attend(q, layer, batch, AttendParams(0.1), tiles=BY_ROWS)
    assert out[:2].isfinite().all() and not out[2].isfinite().any()


@SHAPES
def test_a_query_that_is_not_finite_is_nan_and_no_other(tiles):
    q, layer, batch = make("int8", Step(group=16))
    q[1, 3, 7] = torch.inf
    out, _ = attend(q, layer, batch, AttendParams(0.1), tiles=tiles)
    bad = ~out.isfinite().all(-1)
    assert bad[1, 3] and bad.sum() == 1


@SHAPES
def test_a_request_without_context_gives_nothing(tiles):
    q, layer, batch = make("int8", Step(group=16))
    # As a captured graph may leave it: lengths that moved on the device.
    lens = batch.context_lens.clone()
    lens[1] = 0
    out, lse = attend(q, layer, derive(batch, context_lens=lens), AttendParams(0.1), tiles=tiles)
    assert (out[1] == 0).all() and lse[1].isneginf().all()
    assert out[0].isfinite().all() and out[2].isfinite().all()


@SHAPES
@pytest.mark.parametrize("programs", [1, 5])
def test_any_grid_gives_the_same_result(programs, tiles):
    check("fp8", Step(group=16), replace(tiles, programs_per_processor=programs))


@SHAPES
def test_the_caller_says_where_the_output_goes(tiles):
    q, layer, batch = make("int8", Step(group=16))
    params, out = AttendParams(0.1), torch.full((3, 16, RANK), torch.nan, device=DEVICE).half()
    made, lse = attend(q, layer, batch, params, out=out, lse_wanted=False, tiles=tiles)
    assert made is out and lse is None
    assert relative(out, reference(q.double(), layer, batch, params)[0]) < TOLERANCE


def test_what_is_refused_is_said():
    hopper = DeviceInfo("cuda", "a Hopper GPU", (9, 0), 132)
    call = Call(hopper, FORMATS["int8"], torch.bfloat16, 128, 1, 512, 64, 64, "decode", latent=True)
    assert LATENT_TRITON(call) == []
    for changed, said in (
        ({"latent": False}, "needs latent rows (MLA), got keys with values of their own."),
        ({"format": FORMATS["k8v4"]}, "got one that keeps some"),
        ({"format": FORMATS["int8_static"]}, "needs scales of each token for keys"),
        ({"format": FORMATS["none"], "dtype": torch.float32}, "needs pages of 16 bits for keys"),
        ({"head_dim": 1024}, "needs a head_dim up to 512, got 1024."),
        ({"mask": "interval"}, "needs a causal or full mask, got interval."),
    ):
        assert any(said in each for each in LATENT_TRITON(replace(call, **changed))), changed


@pytest.mark.skipif(not GPU, reason="the planner's shapes are of a device")
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("pair,queries", [("none", 4), ("int8", 1), ("int8", 4), ("fp8", 4)])
def test_the_planners_shapes(pair, heads, queries):
    step = Step(group=heads, queries=(queries, 1, 1), contexts=(4100, 33, 900), page_size=64)
    check(pair, step, None, rank=512, rotary=64)


def test_keys_first_takes_codes_alone():
    q, layer, batch = make("fp8 none", Step(group=16))
    with pytest.raises(ValueError, match="tiles: expected queries by keys"):
        attend(q, layer, batch, AttendParams(0.1), tiles=BY_KEYS)


@pytest.mark.parametrize("tokens", [40, 70])
def test_a_fresh_prompt(tokens):
    """Every tile of query rows walks the keys up to the request's last."""
    step = Step(group=16, queries=(tokens, 9), contexts=(tokens, 33))
    check("int8", step, BY_ROWS)
    check("none", step, replace(BY_ROWS, rows=16, warps=4))
