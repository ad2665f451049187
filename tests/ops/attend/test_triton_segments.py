"""Formats with exact pages in every kernel: contexts around a page's end, keys cut into parts,
windows and sinks within a page. Numbers that are not finite reach nobody who does not see them.
"""

import random
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import (
    CAUSAL,
    DEVICE,
    GPU,
    HOPPER,
    KERNEL_FORMATS,
    NEAR_FORMATS,
    ON_HOPPER,
    TIER,
    TOLERANCE,
    Step,
    assert_agrees,
)

# isort: split
from quantpage import masks
from quantpage.attention import LayerAttention, find_backend
from quantpage.formats import FORMATS, find_format, rotate
from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend import AttendParams, attend
from quantpage.ops.attend.params import exact_pairs
from quantpage.ops.attend.prefill import plan as prefill_plan
from quantpage.ops.attend.prefill import triton as triton_prefill
from quantpage.ops.attend.prefill import ways as prefill
from quantpage.ops.dispatch import Implementation, call_of
from tests.ops.segment_cases import make_segments, oracle, spoil

pytestmark = TIER
MERGE = "quantpage.ops.attend.flash.triton_merge:merge_partials"
PORTABLE = Implementation(
    "triton", "quantpage.ops.attend.prefill.triton:attend", lambda call: [], merge=MERGE
)
DENSE = Implementation(
    "gluon", "quantpage.ops.attend.prefill.gluon:attend", lambda call: [], joins=True
)
INTERVALS = Implementation(
    "triton", "quantpage.ops.attend.interval.triton:attend", lambda call: [], merge=MERGE
)
DENSE_INTERVALS = Implementation(
    "gluon", "quantpage.ops.attend.interval.gluon:attend", lambda call: [], merge=MERGE
)
DECODE = Implementation(
    "triton", "quantpage.ops.attend.decode.triton:attend", lambda call: [], joins=True
)
PAGE = 16
EXACT = [name for name in KERNEL_FORMATS if FORMATS[name].exact_pages is not None]
EXACT += [form.name for form in NEAR_FORMATS]
CAUSAL_KINDS = [
    CAUSAL,
    CausalMask(window=5),
    CausalMask(window=5, sink_tokens=3),
    CausalMask(window=40),
    CausalMask(window=40, sink_tokens=20),
    FullMask(),
]


def named(mask) -> str:
    return f"{mask.kind}-{getattr(mask, 'window', '')}-{getattr(mask, 'sink_tokens', '')}"


@pytest.fixture
def parts(monkeypatch):
    """Cuts the keys of every row into so many parts, whatever the device would have."""

    def cut_into(count: int) -> None:
        monkeypatch.setattr(prefill_plan, "_parts", lambda *given: count)

    for cached in (prefill_plan.plan_pages, prefill_plan.plan_passes):
        cached.cache_clear()
    for cached in (triton_prefill._device_pages, triton_prefill._device_passes):
        cached.cache_clear()
    yield cut_into
    for cached in (prefill_plan.plan_pages, prefill_plan.plan_passes):
        cached.cache_clear()
    for cached in (triton_prefill._device_pages, triton_prefill._device_passes):
        cached.cache_clear()


def check(run, form, step, mask, sinks=False, softcap=None, seed=0):
    q, layer, batch = make_segments(form, step, mask, seed=seed)
    sink = torch.randn(q.shape[1], device=DEVICE) if sinks else None
    params = AttendParams(q.shape[-1] ** -0.5, mask, softcap, sink)
    out, lse = attend(q, layer, batch, params, run)
    assert_agrees(out, lse, *oracle(q, layer, batch, params), TOLERANCE, 10 * TOLERANCE)


@pytest.mark.parametrize("mask", CAUSAL_KINDS, ids=named)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("context", [4 * PAGE, 8 * PAGE + 1, 20 * PAGE - 1])
def test_a_chunk_on_a_prefix(context, count, mask, parts):
    """The keys of each row in as many parts: none counts a key that another has."""
    if count > 1 and getattr(mask, "window", None) is not None:
        pytest.skip("keys behind a window are not cut")
    parts(count)
    step = Step((20,), (context,), PAGE, kv_heads=1, group=2, head_dim=32)
    check(PORTABLE, FORMATS["int4"], step, mask, sinks=True)


@pytest.mark.parametrize("mask", CAUSAL_KINDS, ids=named)
@pytest.mark.parametrize("joins,name", [(True, "int4"), (False, "int4"), (True, "int4_near8")])
def test_decodes_around_the_end_of_a_page(joins, name, mask):
    """The body ends a page before a query's own: with the first token of a page it grows."""
    contexts = tuple(4 * PAGE + more for more in (-1, 0, 1, 2))
    step = Step((1, 2, 1, 3), contexts, PAGE, kv_heads=1, group=2, head_dim=32)
    check(replace(DECODE, joins=joins), find_format(name), step, mask, sinks=True)


@pytest.mark.parametrize(
    ("kernel", "name", "width"),
    [
        ("triton", "int4", 128),
        ("triton", "k8v4_near8", 128),
        ("triton", "int4", 80),
        pytest.param("gluon", "int4", 128, marks=ON_HOPPER),
        pytest.param("gluon", "k8v4_near8", 128, marks=ON_HOPPER),
    ],
)
def test_decode_turns_its_results_back(kernel, name, width):
    """Where it joins the pieces, in whatever number of them; 80 channels are blocks of 16."""
    page = 64 if kernel == "gluon" else PAGE
    contexts = (1, 3 * page + 1, 5 * page - 1, 20 * page)
    by = Implementation(
        kernel, f"quantpage.ops.attend.decode.{kernel}:attend", lambda call: [], joins=True,
        turns=True, into=True,
    )  # fmt: skip
    for requests in (contexts, contexts[3:], contexts[:1]):
        step = Step((1,) * len(requests), requests, page, kv_heads=2, group=3, head_dim=width)
        q, layer, batch = make_segments(find_format(name), step, CAUSAL)
        assert layer.out_rotated
        sinks = torch.randn(q.shape[1], device=DEVICE)
        params = AttendParams(width**-0.5, CAUSAL, sinks=sinks)
        out, lse = attend(q, layer, batch, params, by, model_basis=True)
        wanted, sums = oracle(q, layer, batch, params)
        assert_agrees(out, lse, rotate(wanted), sums, TOLERANCE, 10 * TOLERANCE)


@pytest.mark.parametrize("window", [1, PAGE + 1, 2 * PAGE + 1])
@pytest.mark.parametrize("sink_tokens", [PAGE, PAGE + 1, 3 * PAGE - 2, 4 * PAGE])
def test_sink_tokens_behind_the_first_page(sink_tokens, window):
    """They may lie in a near page, before the window."""
    mask = CausalMask(window=window, sink_tokens=sink_tokens)
    for new, context in ((6 * PAGE, 6 * PAGE), (2 * PAGE, 5 * PAGE + 3)):
        step = Step((new,), (context,), PAGE, kv_heads=1, group=2, head_dim=32)
        check(PORTABLE, FORMATS["int4"], step, mask)
    contexts = tuple(range(2 * PAGE, 6 * PAGE, 7))
    step = Step((2,) * len(contexts), contexts, PAGE, kv_heads=1, group=2, head_dim=32)
    check(DECODE, FORMATS["int4"], step, mask)


@pytest.mark.parametrize("seed", range(40 if GPU else 12))
def test_any_step_in_any_kernel(seed, parts, monkeypatch):
    """Ragged steps of every exact format: chunks, decodes, whole prompts, requests at rest."""
    choice = random.Random(seed)
    page = choice.choice([16, 16, 32, 64, 128])

    def length(most: int) -> int:
        return max(1, choice.randint(1, most) * page + choice.choice([-1, 0, 1]))

    most = (640 if GPU else 160) // page
    contexts = [length(max(2, most)) for _ in range(choice.randint(1, 2))]
    new = [choice.choice([0, 1, choice.randint(1, 30), context]) for context in contexts]
    new = [min(n, context) for n, context in zip(new, contexts, strict=True)]
    new[0] = max(new[0], 1)
    mask = choice.choice(
        [
            CAUSAL,
            CausalMask(window=choice.randint(1, 2 * page)),
            CausalMask(window=choice.randint(1, 2 * page), sink_tokens=choice.randint(1, 3 * page)),
            FullMask(),
        ]
    )
    step = Step(
        tuple(new), tuple(contexts), page, choice.choice([1, 2]), choice.choice([1, 3, 4]), 32
    )
    form = find_format(choice.choice(EXACT))
    parts(choice.randint(1, 8))
    runs = [PORTABLE]
    if HOPPER:
        runs.append(DENSE)
    if max(new) <= 16:
        runs += [DECODE, replace(DECODE, joins=False)]
    least = choice.choice([2**30, 1])
    for kernel in ("triton", "gluon"):
        monkeypatch.setitem(prefill.WORKSPACE_ROWS, kernel, least)
    sinks, softcap = choice.random() < 0.5, choice.choice([None, 3.0])
    for run in runs:
        check(run, form, step, mask, sinks, softcap, seed)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    "kind",
    [
        "sliding_window",
        "causal_document",
        "prefix_lm_document",
        "global_and_sliding_window",
        "causal_blockwise",
    ],
)
def test_interval_masks(name, kind, monkeypatch):
    context, start = 9 * PAGE + 1, 5 * PAGE - 1
    mask = {
        "sliding_window": lambda: masks.sliding_window(context, 7),
        "causal_document": lambda: masks.causal_document([40, context - 40]),
        "prefix_lm_document": lambda: masks.prefix_lm_document([(9, 50), (70, context - 50)]),
        "global_and_sliding_window": lambda: masks.global_sliding_window(context, 5, 20),
        "causal_blockwise": lambda: masks.causal_blockwise([50, 40, context - 90]),
    }[kind]()
    step = Step((context - start,), (context,), PAGE, kv_heads=2, group=2, head_dim=32)
    runs = [INTERVALS]
    if HOPPER:
        from quantpage.ops.attend.interval import gluon as gluon_flash_mask

        monkeypatch.setattr(gluon_flash_mask, "FEW_ROWS", 0)
        runs.append(DENSE_INTERVALS)
    for run in runs:
        check(run, find_format(name), step, mask, sinks=True)


READ = [  # format, half, what runs, whether the cache is read through a workspace
    ("none", "prefill", 2**30),
    ("none", "prefill", 1),
    ("int4", "prefill", 2**30),
    ("none", "intervals", 1),
    ("int4", "intervals", 1),
    ("none", "decode", 1),
    ("int4", "decode", 1),
]


@pytest.mark.parametrize("name,kernel,least", READ)
@pytest.mark.parametrize("windowed", [False, True])
def test_what_is_not_finite_reaches_only_those_who_see_it(
    name, kernel, least, windowed, monkeypatch
):
    """A NaN that a later query sees, or that an earlier one saw, beside those that do not."""
    monkeypatch.setitem(prefill.WORKSPACE_ROWS, "triton", least)
    monkeypatch.setitem(prefill.WORKSPACE_ROWS, "gluon", least)
    context, new = 5 * PAGE + 1, 9 if kernel == "decode" else 2 * PAGE + 7
    mask = CausalMask(window=11) if windowed else CAUSAL
    if kernel == "intervals":
        mask = masks.sliding_window(context, 11) if windowed else masks.causal_document([context])
    run = {"prefill": PORTABLE, "intervals": INTERVALS, "decode": DECODE}[kernel]
    runs = [run]
    if HOPPER and kernel != "decode" and least == 1:
        from quantpage.ops.attend.interval import gluon as gluon_flash_mask

        monkeypatch.setattr(gluon_flash_mask, "FEW_ROWS", 0)
        runs.append(DENSE if kernel == "prefill" else DENSE_INTERVALS)
    step = Step((new,), (context,), PAGE, kv_heads=1, group=2, head_dim=128 if GPU else 32)
    form = FORMATS[name]
    if form.exact_pages is None:
        q, layer, batch = make_plain(form, step, mask)
    else:
        q, layer, batch = make_segments(form, step, mask)
    params = AttendParams(q.shape[-1] ** -0.5, mask)
    at = context - new // 2
    positions, keys = torch.arange(context - new, context), torch.arange(context)
    reads = mask.materialize(positions, context)[:, at]
    if form.exact_pages is not None:
        reads &= exact_pairs(positions, keys, PAGE)[:, at]
    assert reads.any() and not reads.all()
    for run in runs:
        clean, clean_lse = attend(q, layer, batch, params, run)
        for half, what in product(("key", "value"), (torch.nan, torch.inf, -torch.inf)):
            out, lse = attend(q, spoil(layer, batch, at, what, half), batch, params, run)
            assert torch.equal(out[~reads], clean[~reads]), (half, what)
            assert torch.equal(lse[~reads], clean_lse[~reads]), (half, what)
            # An infinite key may weigh nothing.
            if half == "value" or what != what:
                assert not out[reads].isfinite().flatten(1).all(1).any(), (half, what)


def make_plain(form, step, mask):
    from tests.ops.triton_cases import make_step

    return make_step(form.key, form.value, step, mask)


@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4"])
@pytest.mark.parametrize("kernel", ["prefill", "intervals", "decode"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf], ids=str)
def test_a_query_that_is_not_finite_stays_so(name, kernel, what, monkeypatch):
    context, new = 3 * PAGE + 5, 4 if kernel == "decode" else 20
    mask = masks.causal_document([context]) if kernel == "intervals" else CAUSAL
    run = {"prefill": PORTABLE, "intervals": INTERVALS, "decode": DECODE}[kernel]
    form = FORMATS[name]
    step = Step((new,), (context,), PAGE, kv_heads=1, group=2, head_dim=64)
    make = make_plain if form.exact_pages is None else make_segments
    q, layer, batch = make(form, step, mask)
    params = AttendParams(q.shape[-1] ** -0.5, mask)
    clean = attend(q, layer, batch, params, run)[0] if kernel == "decode" else None
    q[2, 1, 5] = what
    # Decode has no workspace.
    for least in (2**30, 1) if kernel != "decode" else (1,):
        monkeypatch.setitem(prefill.WORKSPACE_ROWS, "triton", least)
        out, lse = attend(q, layer, batch, params, run)
        assert not out[2, 1].isfinite().any()
        assert not lse[2, 1].isfinite() and not lse[2, 1].isneginf()
        others = torch.ones(q.shape[:2], dtype=torch.bool)
        others[2, 1] = False
        assert out[others].isfinite().all()
        if clean is not None:
            assert torch.equal(out[others], clean[others])


def serving(layer, q, mask) -> LayerAttention:
    """As ``build_attention`` gives on a GPU: one kernel decodes, another one takes prompts."""
    call = call_of(layer.facts, q.shape[1], q.dtype, "prefill", mask.kind)
    return LayerAttention(find_backend("flash"), PORTABLE, PORTABLE, DECODE, call)


@pytest.mark.parametrize(
    ("queries", "contexts", "ends"),
    [
        ((1, 20, 3, 30), (70, 33, 50, 30), (1, 2, 3, 4)),
        ((20, 1), (80, 90), (1, 2)),
        ((1, 0, 16, 17), (5 * PAGE, 40, 3 * PAGE + 1, 100), (3, 4)),
        # More parts than are worth it: whole.
        ((1, 20, 1, 20, 1), (70, 33, 50, 30, 20), (5,)),
    ],
)
@pytest.mark.parametrize(
    ("name", "mask"),
    [*((name, CAUSAL) for name in EXACT), ("int4", CausalMask(window=40, sink_tokens=20))],
)
def test_requests_that_decode_beside_prompts(queries, contexts, ends, name, mask):
    step = Step(queries, contexts, PAGE, kv_heads=1, group=2, head_dim=32)
    q, layer, batch = make_segments(find_format(name), step, mask)
    params = AttendParams(q.shape[-1] ** -0.5, mask, None, torch.randn(2, device=DEVICE))
    layers = serving(layer, q, mask)
    out = torch.full_like(q, torch.nan)
    made, lse = layers.attend_step(q, layer, batch, params, out=out)
    assert made is out
    wanted, wanted_lse = oracle(q, layer, batch, params)
    wanted = rotate(wanted) if layer.out_rotated else wanted
    assert_agrees(out, lse, wanted, wanted_lse, TOLERANCE, 10 * TOLERANCE)
    again = layers.attend_step(q, layer, batch, params, lse_wanted=False)
    assert again.lse is None and torch.equal(again.out, out)
    # Bit by bit what these requests get alone, by the kernel that serves them there.
    for first, end in pairwise((0, *ends)):
        rows = slice(sum(queries[:first]), sum(queries[:end]))
        by = DECODE if max(queries[first:end]) <= 16 else PORTABLE
        alone = attend(q[rows], layer, batch.part(first, end), params, by, model_basis=True)[0]
        assert torch.equal(out[rows], alone)


def test_a_step_that_is_refused_leaves_its_results_alone():
    step = Step((1, 20), (70, 33), PAGE, kv_heads=1, group=2, head_dim=32)
    q, layer, batch = make_segments(FORMATS["int4"], step, CAUSAL)
    out = torch.full_like(q, 7)
    sinks = AttendParams(1.0, CAUSAL, None, torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="sinks: expected 2 logits"):
        serving(layer, q, CAUSAL).attend_step(q, layer, batch, sinks, out=out)
    with pytest.raises(ValueError, match="out: expected"):
        serving(layer, q, CAUSAL).attend_step(q, layer, batch, AttendParams(1.0), out=out[:20])
    with pytest.raises(ValueError, match="q: expected"):
        serving(layer, q, CAUSAL).attend_step(q[:20], layer, batch, AttendParams(1.0))
    assert (out == 7).all()
