"""The Hopper prefill against the float64 reference; needs a GPU of compute capability 9.0."""

import math
from dataclasses import replace

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import (
    CAUSAL,
    DEVICE,
    HOPPER,
    KERNEL_FORMATS,
    ON_HOPPER,
    Step,
    assert_agrees,
    candidate,
    make_step,
    relative,
)

# isort: split
from quantpage.formats import CODES, FORMATS, Granularity, QuantSpec, find_format
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend import attend as attend_segments
from quantpage.ops.attend.prefill import ways as prefill
from quantpage.ops.attend.reference import attend as reference

pytestmark = ON_HOPPER
if HOPPER:
    from quantpage.ops.attend.prefill import gluon as gluon_prefill

# Operands of 11 bits (float16) or 8 (bfloat16), and an output of as many.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
RAGGED = Step((200, 1, 0, 70, 33), (700, 300, 50, 70, 333), page_size=64, head_dim=128)


@pytest.fixture(autouse=True)
def _everything_through_the_workspace(monkeypatch):
    monkeypatch.setitem(prefill.WORKSPACE_ROWS, "gluon", 1)


def check(key, value, step, mask=CAUSAL, softcap=None, sinks=False, dtype=torch.bfloat16):
    q, layer, batch = make_step(key, value, step, mask, dtype)
    sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, mask, softcap, sink)
    out, lse = gluon_prefill.attend(q, layer, batch, params)
    wanted = reference(q.double(), layer, batch, params)
    assert out.dtype == dtype
    assert_agrees(out, lse, *wanted, TOLERANCE[dtype], 10 * TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_every_format(name, dtype):
    given = FORMATS[name]
    check(given.key, given.value, RAGGED, dtype=dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_every_head_dim(head_dim):
    given = FORMATS["int8"]
    check(given.key, given.value, replace(RAGGED, head_dim=head_dim))


@pytest.mark.parametrize(
    "step",
    [
        replace(RAGGED, group=7),
        replace(RAGGED, group=1, kv_heads=3, page_size=16),
        replace(RAGGED, value_dim=64),
        Step((512,), (576,), page_size=256, head_dim=128),
        Step((3,) * 50, tuple(range(3, 53)), page_size=32, head_dim=128),
    ],
    ids=["group7", "mha-page16", "value64", "k-q", "many"],
)
def test_awkward_shapes(step):
    check(FORMATS["int8"].key, FORMATS["int8"].value, step)


@pytest.mark.parametrize(
    "mask",
    [
        CausalMask(window=1),
        CausalMask(window=100),
        CausalMask(window=100, sink_tokens=4),
        CausalMask(window=100, sink_tokens=130),
        FullMask(),
    ],
    ids=["window1", "window100", "sink4", "sink130", "full"],
)
def test_masks_skip_poisoned_slots(mask):
    check(FORMATS["fp8"].key, FORMATS["fp8"].value, RAGGED, mask)


def test_softcap_and_sink_logits():
    check(FORMATS["int8"].key, FORMATS["int8"].value, RAGGED, softcap=1.5)
    check(FORMATS["int4"].key, FORMATS["int4"].value, RAGGED, sinks=True)


@pytest.mark.parametrize("bits", [4, 30, 300, -30])
@pytest.mark.parametrize("name", ["int8", "none"])
def test_scores_that_leave_the_maximum_behind(name, bits):
    """Scores climb by so many bits over 700 keys: less in a key tile than a maximum may stay behind
    (gluon_parts.BEHIND), more in two, more in each; or they fall."""
    given = FORMATS[name]
    dtype = torch.float16 if given.key.quantized else torch.bfloat16
    q, layer, batch = make_step(given.key, given.value, RAGGED, CAUSAL, dtype)
    # Exact in 16 bits, so that a large score is as exact as a small one.
    unit = 2.0**-7
    codes = torch.linspace(-127, 127, 768, device=DEVICE).round() * (1 if name == "int8" else unit)
    for table, context in zip(batch.page_table, batch.host_context_lens, strict=True):
        for at, page in enumerate(table[: -(-context // 64)].tolist()):
            layer.key.codes[page, ..., 0] = codes[at * 64 : at * 64 + 64].to(layer.key.codes.dtype)
    if layer.key.scale is not None:
        layer.key.scale.fill_(unit)
    params = AttendParams(q.shape[-1] ** -0.5)
    q[..., 0] = bits / (254 * unit * params.softmax_scale * math.log2(math.e))
    out, lse = gluon_prefill.attend(q, layer, batch, params)
    wanted = reference(q.double(), layer, batch, params)
    assert_agrees(out, lse, *wanted, TOLERANCE[dtype], 10 * TOLERANCE[torch.float16])


@pytest.mark.parametrize("name", ["int4_static", "int8_static", "fp8_static"])
@pytest.mark.parametrize("sinks", [False, True])
def test_numbers_of_given_scales_are_not_rounded(name, sinks):
    """A mean over many keys shows what every key's rounding has in common."""
    step = Step((300,), (40_000,), page_size=64, kv_heads=1, head_dim=128)
    given = FORMATS[name]
    check(given.key, given.value, step, sinks=sinks, dtype=torch.float16)


def test_groups_of_channels():
    spec = QuantSpec(CODES["int4"], Granularity(group=32), zero_point=True)
    check(spec, spec, RAGGED)


def check_exact(name, step, mask=CAUSAL):
    """Both segments in one call, with and without a log-sum-exp, to the caller's memory or not."""
    given = find_format(name)
    q, layer, batch = make_step(
        given.key, given.value, step, mask, torch.float16, exact=True, near=given.near
    )
    params = AttendParams(q.shape[-1] ** -0.5, mask, None, torch.randn(q.shape[1], device=DEVICE))
    run = candidate("prefill.gluon")
    out, lse = attend_segments(q, layer, batch, params, run)
    wanted, wanted_lse = reference(q.double(), layer, batch, params)
    assert relative(out, wanted) < TOLERANCE[torch.float16]
    assert (lse.cpu() - wanted_lse).abs().max() < 10 * TOLERANCE[torch.float16]
    place = torch.empty_like(out)
    again, none = attend_segments(q, layer, batch, params, run, lse_wanted=False, out=place)
    assert again is place and none is None and torch.equal(again, out)


@pytest.mark.parametrize("mask", [CAUSAL, CausalMask(window=100, sink_tokens=70), FullMask()])
@pytest.mark.parametrize("name", ["int4", "int4_near8"])
def test_exact_pages_are_read_beside_the_codes(name, mask):
    check_exact(name, RAGGED, mask)


@pytest.mark.parametrize("more", [{}, {"processors": 1}])
def test_exact_pages_are_read_in_the_first_of_several_passes(more, monkeypatch):
    plain = gluon_prefill.workspace_shape
    monkeypatch.setattr(
        gluon_prefill,
        "workspace_shape",
        lambda *given: replace(plain(*given), cap=300_000, **more),
    )
    check_exact("int4", Step((200, 40), (1500, 600), page_size=64, head_dim=128))


def test_exact_pages_are_read_by_the_first_part():
    check_exact("int4", Step((40,), (9000,), page_size=64, head_dim=128, kv_heads=1))


@pytest.mark.parametrize("least", [256, 512])
def test_exact_pages_of_a_mixed_step(least, monkeypatch):
    """Through a workspace as the requests' mean of 304 rows is enough, and a merge where not."""
    monkeypatch.setitem(prefill.WORKSPACE_ROWS, "gluon", least)
    check_exact("int4", RAGGED)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("more", [{}, {"processors": 1}])
def test_capped_workspace_goes_over_keys_or_heads(more, sinks, monkeypatch):
    plain = gluon_prefill.workspace_shape
    monkeypatch.setattr(
        gluon_prefill,
        "workspace_shape",
        lambda *given: replace(plain(*given), cap=300_000, **more),
    )
    step = Step((200, 40), (1500, 600), page_size=64, head_dim=128)
    check(FORMATS["int8"].key, FORMATS["int8"].value, step, sinks=sinks)


def test_keys_split_into_parts_give_the_same_rows():
    step = Step((40,), (9000,), page_size=64, head_dim=128, kv_heads=1)
    check(FORMATS["int8"].key, FORMATS["int8"].value, step, sinks=True)


def test_a_mixed_step_is_its_requests(monkeypatch):
    monkeypatch.setitem(prefill.WORKSPACE_ROWS, "gluon", 256)
    check(FORMATS["int8"].key, FORMATS["int8"].value, RAGGED)


def test_chunks_give_what_the_whole_gives():
    given = FORMATS["int8"]
    whole = Step((700,), (700,), page_size=64, head_dim=128)
    q, layer, batch = make_step(given.key, given.value, whole, CAUSAL, torch.bfloat16)
    params = AttendParams(q.shape[-1] ** -0.5)
    all_at_once, _ = gluon_prefill.attend(q, layer, batch, params)
    chunk = replace(
        batch,
        query_starts=torch.tensor([0, 333], dtype=torch.int32, device=DEVICE),
        slots=batch.slots[-333:],
        positions=batch.positions[-333:],
        query_lens=(333,),
    )
    last, _ = gluon_prefill.attend(q[-333:], layer, chunk, params)
    assert relative(last, all_at_once[-333:]) < TOLERANCE[torch.bfloat16]
