"""The portable prefill against the float64 reference, in the interpreter or on a GPU."""

from dataclasses import replace

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import (
    CAUSAL,
    DEVICE,
    GPU,
    KERNEL_FORMATS,
    TIER,
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
from quantpage.ops.attend.prefill import triton as triton_prefill
from quantpage.ops.attend.prefill import ways as prefill
from quantpage.ops.attend.reference import attend as reference

pytestmark = TIER
# float16 operands and probabilities: eleven bits, summed over a context.
TOLERANCE = 1e-3
RAGGED = Step(queries=(20, 0, 33), contexts=(70, 50, 131), kv_heads=1, head_dim=32)


@pytest.fixture(params=["pages", "workspace"])
def way(request, monkeypatch):
    """Forces every request through pages, or through the workspace."""
    least = 1 if request.param == "workspace" else 2**30
    monkeypatch.setitem(prefill.WORKSPACE_ROWS, "triton", least)
    monkeypatch.setattr(prefill, "DECODE_TOKENS", 0)
    return request.param


def check(key, value, step, mask=CAUSAL, softcap=None, sinks=False, tolerance=TOLERANCE):
    q, layer, batch = make_step(key, value, step, mask)
    sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, mask, softcap, sink)
    out, lse = triton_prefill.attend(q, layer, batch, params)
    wanted = reference(q.double(), layer, batch, params)
    assert out.dtype == q.dtype
    assert_agrees(out, lse, *wanted, tolerance, 10 * tolerance)


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_every_format(name, way):
    given = FORMATS[name]
    check(given.key, given.value, RAGGED)


@pytest.mark.parametrize(
    "step",
    [
        replace(RAGGED, group=7, page_size=64),
        replace(RAGGED, group=1, kv_heads=2, page_size=128, head_dim=80),
        Step((64,), (129,), page_size=32, kv_heads=1, group=2, head_dim=16, value_dim=32),
        Step((0, 17), (0, 17), page_size=256, kv_heads=1, group=3),
    ],
    ids=lambda step: f"group{step.group}-page{step.page_size}-dim{step.head_dim}",
)
def test_awkward_shapes(step, way):
    check(FORMATS["int8"].key, FORMATS["int8"].value, step)


@pytest.mark.parametrize(
    "key,value", [("int6", "int6"), ("int3", "int3"), ("int6", "int4"), ("none", "int3")]
)
@pytest.mark.parametrize("head_dim", [80, 128])
def test_planes(key, value, head_dim, way):
    step = replace(RAGGED, page_size=64, head_dim=head_dim)
    check(FORMATS[key].key, FORMATS[value].value, step)


@pytest.mark.parametrize(
    "mask",
    [
        CausalMask(window=1),
        CausalMask(window=40),
        CausalMask(window=20, sink_tokens=5),
        CausalMask(window=30, sink_tokens=70),
        FullMask(),
    ],
    ids=lambda mask: (
        f"{mask.kind}-{getattr(mask, 'window', '')}-{getattr(mask, 'sink_tokens', '')}"
    ),
)
def test_masks_skip_poisoned_slots(mask, way):
    check(FORMATS["fp8"].key, FORMATS["fp8"].value, replace(RAGGED, group=2), mask)


def test_softcap(way):
    check(FORMATS["int8"].key, FORMATS["int8"].value, RAGGED, softcap=1.5)


@pytest.mark.parametrize("name", ["int4", "int4_static"])
def test_sink_logits(name, way):
    check(FORMATS[name].key, FORMATS[name].value, RAGGED, sinks=True)


@pytest.mark.parametrize("code", ["int6", "int3"])
def test_given_scales_of_planes(code, way):
    spec = QuantSpec(CODES[code], Granularity(group=1), dynamic=False, zero_point=True)
    check(spec, spec, RAGGED, sinks=True)


@pytest.mark.parametrize("name", ["int4_static", "int8_static", "fp8_static"])
def test_numbers_of_given_scales_are_not_rounded(name, way):
    """A channel has as many numbers as codes. Each rounded to 16 bits would be off by the same in
    every key, and a mean over many keys would show it: 2.5e-3 here, where random roundings give
    2e-4.
    """
    step = Step((20,), (4096,), page_size=64, kv_heads=1, group=1, head_dim=32)
    check(FORMATS[name].key, FORMATS[name].value, step, tolerance=7e-4)


def test_groups_of_channels(way):
    spec = QuantSpec(CODES["int4"], Granularity(group=16), zero_point=True)
    check(spec, QuantSpec(CODES["int8"], Granularity(group=16)), RAGGED)
    planes = QuantSpec(CODES["int6"], Granularity(group=16), zero_point=True)
    check(planes, replace(planes, code=CODES["int3"]), RAGGED)


@pytest.mark.parametrize("mask", [CAUSAL, CausalMask(window=40, sink_tokens=20), FullMask()])
@pytest.mark.parametrize("name", ["int4", "int4_near8"])
def test_exact_pages_are_one_more_segment(name, mask, way):
    given = find_format(name)
    step = replace(RAGGED, group=2, page_size=16)
    q, layer, batch = make_step(given.key, given.value, step, mask, exact=True, near=given.near)
    params = AttendParams(q.shape[-1] ** -0.5, mask, None, torch.randn(q.shape[1], device=DEVICE))
    run = candidate("prefill.triton")
    out, lse = attend_segments(q, layer, batch, params, run)
    wanted, wanted_lse = reference(q.double(), layer, batch, params)
    assert relative(out, wanted) < TOLERANCE
    assert (lse.cpu() - wanted_lse).abs().max() < 10 * TOLERANCE


def test_keys_split_into_parts_give_the_same_rows(way, monkeypatch):
    """One tile on a long context leaves processors idle: its keys are split and merged."""
    step = Step((20,), (1600,), page_size=64, kv_heads=1, group=1, head_dim=16)
    parts = []
    plain = triton_prefill.merge_parts

    def counted(made, *rest):
        parts.append(len(made.out))
        plain(made, *rest)

    monkeypatch.setattr(triton_prefill, "merge_parts", counted)
    check(FORMATS["int8"].key, FORMATS["int8"].value, step, sinks=True)
    assert parts[0] == 3


def test_capped_workspace_goes_over_heads(way, monkeypatch):
    if way == "pages":
        pytest.skip("pages need no workspace")
    plain = triton_prefill._shape
    monkeypatch.setattr(
        triton_prefill,
        "_shape",
        lambda *given: (replace(plain(*given)[0], cap=20_000), plain(*given)[1]),
    )
    step = Step((40, 20), (150, 70), kv_heads=3, group=2, head_dim=32)
    check(FORMATS["int8"].key, FORMATS["int8"].value, step)


@pytest.mark.parametrize("rows", [64, 2**30])
@pytest.mark.parametrize(
    "step",
    [
        Step((1, 40, 0, 2, 20), (90, 60, 30, 40, 33), kv_heads=1, group=2, head_dim=64),
        # Decodes side by side, first or last: in place, without a copy of queries or results.
        Step((1, 3, 0, 2, 40), (90, 60, 30, 40, 50), kv_heads=1, group=2, head_dim=64),
        Step((40, 2, 1), (60, 20, 90), kv_heads=1, group=2, head_dim=64),
    ],
)
def test_a_mixed_step_is_its_requests(rows, step, monkeypatch):
    """Decodes, a chunk from pages and a chunk through a workspace, in one step."""
    monkeypatch.setitem(prefill.WORKSPACE_ROWS, "triton", rows)
    prefill.choose_ways.cache_clear()
    check(FORMATS["int8"].key, FORMATS["int8"].value, step)
    prefill.choose_ways.cache_clear()


def test_decodes_of_a_mixed_step_are_taken_once_for_all_layers(monkeypatch):
    taken = []
    plain = prefill.take_requests
    monkeypatch.setattr(
        prefill, "take_requests", lambda *given: taken.append(given[1]) or plain(*given)
    )
    step = Step((1, 40, 2), (90, 60, 40), kv_heads=1, group=2, head_dim=64)
    q, layer, batch = make_step(FORMATS["int8"].key, FORMATS["int8"].value, step, CAUSAL)
    params = AttendParams(q.shape[-1] ** -0.5)
    wanted, _ = triton_prefill.attend(q, layer, batch, params)
    again, _ = triton_prefill.attend(q, layer, batch, params)
    assert torch.equal(wanted, again)
    assert taken == [(0, 2)]
    # Another step in the same tensors.
    batch.context_lens.add_(0)
    triton_prefill.attend(q, layer, batch, params)
    assert taken == [(0, 2), (0, 2)]


def test_decodes_of_a_mixed_step_that_the_decode_kernel_refuses_read_pages():
    """Several scales a token: served in prefill, so that a decode beside a prompt is served."""
    spec = QuantSpec(CODES["int8"], Granularity(group=16))
    check(spec, spec, Step((1, 40), (90, 60), kv_heads=1, group=2, head_dim=64))


def test_chunks_give_what_the_whole_gives(way):
    """Queries of a later chunk see the same keys as in one long prefill, to rounding."""
    given = FORMATS["int8"]
    whole = Step((100,), (100,), kv_heads=1, group=2, head_dim=32)
    q, layer, batch = make_step(given.key, given.value, whole, CAUSAL)
    params = AttendParams(q.shape[-1] ** -0.5)
    all_at_once, _ = triton_prefill.attend(q, layer, batch, params)
    chunk = replace(
        batch,
        query_starts=torch.tensor([0, 37], dtype=torch.int32, device=DEVICE),
        slots=batch.slots[-37:],
        positions=batch.positions[-37:],
        query_lens=(37,),
    )
    last, _ = triton_prefill.attend(q[-37:], layer, chunk, params)
    assert relative(last, all_at_once[-37:]) < TOLERANCE


@pytest.mark.skipif(not GPU, reason="the interpreter's bfloat16 products are wrong")
@pytest.mark.parametrize("name", ["none", "int8", "int4", "k=none,v=int4", "k=int8,v=none"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_bfloat16_queries(name, head_dim, way):
    given = find_format(name)
    step = Step((300, 1, 65), (700, 33, 65), page_size=64, head_dim=head_dim)
    q, layer, batch = make_step(given.key, given.value, step, CAUSAL, torch.bfloat16)
    params = AttendParams(head_dim**-0.5)
    out, _ = triton_prefill.attend(q, layer, batch, params)
    wanted, _ = reference(q.double(), layer, batch, params)
    # Eight bits of bfloat16 in the output, and in the probabilities of an unquantized cache.
    assert relative(out, wanted) < 4e-3


@pytest.mark.skipif(not GPU, reason="shared memory is a card's")
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("head_dim", [80, 128, 256])
@pytest.mark.parametrize("name", ["none", "k8v4"])
def test_float32_pages_fit_into_shared_memory(name, head_dim, page_size, way):
    given = FORMATS[name]
    step = Step((14, 65), (14, 300), page_size=page_size, head_dim=head_dim)
    exact = name != "none"
    q, layer, batch = make_step(given.key, given.value, step, CAUSAL, torch.float32, exact=exact)
    params = AttendParams(head_dim**-0.5)
    run = candidate("prefill.triton")
    out, _ = attend_segments(q, layer, batch, params, run)
    wanted, _ = reference(q.double(), layer, batch, params)
    assert relative(out, wanted) < TOLERANCE
