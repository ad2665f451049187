"""The mask kernels against the torch planner and the oracle, in the interpreter or on a GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.triton_cases import (
    DEVICE,
    HOPPER,
    KERNEL_FORMATS,
    TIER,
    candidate,
    relative,
    to_device,
)

# isort: split
from quantpage import masks
from quantpage.batch import BatchPlan, derive
from quantpage.masks import ColumnIntervals, RowIntervals
from quantpage.ops.attend import AttendParams, attend, reference
from quantpage.ops.attend.interval import plan as mask_plan
from quantpage.ops.attend.interval import triton as triton_flash_mask
from quantpage.ops.attend.interval import triton_plan as triton_mask_plan
from quantpage.ops.attend.interval.plan import MaskTile, lower
from quantpage.ops.attend.interval.triton import attend as triton_attend
from quantpage.ops.attend.interval.triton import lowered
from tests.masks.drawn import any_mask, every_kind
from tests.ops.mask_cases import cached

pytestmark = TIER

KINDS = sorted(every_kind(24))


@pytest.fixture(params=["portable", "hopper"] if HOPPER else ["portable"])
def kernel(request, monkeypatch):
    """What serves the step, short as it is."""
    name = "triton"
    if request.param == "hopper":
        from quantpage.ops.attend.interval import gluon as gluon_flash_mask

        name = "gluon"
        # So few rows would go to the portable kernel.
        monkeypatch.setattr(gluon_flash_mask, "FEW_ROWS", 0)
    return candidate(f"interval.{name}")


def to_gpu(batch: BatchPlan) -> BatchPlan:
    moved = {
        name: getattr(batch, name).to(DEVICE)
        for name in ("query_starts", "context_lens", "page_table", "slots", "positions")
    }
    exact = batch.exact
    if exact is not None:
        exact = replace(exact, page_table=exact.page_table.to(DEVICE), slots=exact.slots.to(DEVICE))
    return replace(batch, **moved, exact=exact)


def check(kernel, case, mask, chunks, sinks=None, softcap=None):
    q, batch = case.step(chunks)
    params = AttendParams(case.layer.key.head_dim**-0.5, mask, softcap, sinks)
    wanted, wanted_lse = reference.attend(q, case.layer, batch, params)
    if sinks is not None:
        params = replace(params, sinks=sinks.to(DEVICE))
    empty = wanted_lse.isneginf()
    out, lse = attend(q.to(DEVICE), to_device(case.layer), to_gpu(batch), params, kernel)
    assert torch.equal(lse.cpu().isneginf(), empty)
    assert (out.cpu()[empty] == 0).all()
    assert relative(out, wanted) < 2e-3
    torch.testing.assert_close(lse.cpu()[~empty].double(), wanted_lse[~empty], atol=4e-3, rtol=1e-3)


def test_small_probabilities_keep_their_bits(kernel):
    """One key takes nearly all of the weight, and has no value: 2^-20 is subnormal in float16."""
    case = cached("none", [5])
    keys, values = (half.codes[case.tables[0][0]] for half in (case.layer.key, case.layer.value))
    keys[:, :5] = 0
    keys[:, :5, 0] = torch.tensor([8.0, 0.01, 0.12, 0.23, 0.31])
    values[:, 0] = 0
    values[:, 1:5] = 30000 + 1000 * values[:, 1:5]
    case.q[0][:] = 0
    case.q[0][..., 0] = 10
    check(kernel, case, masks.document([5]), [(4, 5)])


@pytest.mark.parametrize("segment", ["all", "body", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_device_plan_is_the_torch_plan(kind, segment):
    mask = every_kind(150)[kind]
    case = cached("int8", [150, 97])
    _, batch = case.step([(0, 150), (61, 90)])
    if kind == "tree_verification":
        mask = masks.TreeMask.from_parents([144, 80], [-1, 0, 0, 1, -1, 4])
    form, tile = lower(mask), MaskTile(32, 16)
    wanted = mask_plan.plan_tiles(form, batch, 3, tile, segment)
    found = triton_mask_plan.plan_tiles(form.to(DEVICE), to_gpu(batch), 3, tile, segment)
    assert torch.equal(found.counts.cpu(), wanted.counts)
    for row, (full, partial) in enumerate(wanted.counts[:, 0].tolist()):
        mine, theirs = found.tiles[row, 0].cpu(), wanted.tiles[row, 0]
        assert torch.equal(mine[:full], theirs[:full])
        end = len(theirs)
        assert torch.equal(mine[end - partial :], theirs[end - partial :])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_device_plan_of_any_mask(data):
    contexts = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=2))
    heads = data.draw(st.sampled_from([1, 2]))
    mask = data.draw(any_mask(max(contexts), batch=len(contexts), heads=heads))
    new = [data.draw(st.integers(0, context)) for context in contexts]
    _, batch = cached("int8", contexts).step(
        [(context - n, context) for context, n in zip(contexts, new, strict=True)]
    )
    tile = MaskTile(data.draw(st.sampled_from([8, 16])), data.draw(st.sampled_from([8, 16])))
    group = data.draw(st.integers(1, 3))
    wanted = mask_plan.plan_tiles(mask, batch, group, tile)
    found = triton_mask_plan.plan_tiles(mask.to(DEVICE), to_gpu(batch), group, tile)
    assert torch.equal(found.counts.cpu(), wanted.counts)
    listed = wanted.tiles >= 0
    assert torch.equal(found.tiles.cpu()[listed], wanted.tiles[listed])


@pytest.mark.parametrize("heads", [1, 3])
def test_order_is_by_visits_longest_first(heads):
    noise = torch.Generator().manual_seed(heads)
    counts = torch.randint(0, 9, (150, heads, 2), generator=noise, dtype=torch.int32).to(DEVICE)
    plan = mask_plan.MaskPlan(counts, counts, counts)
    order = triton_mask_plan.visit_order(plan).cpu().long()
    wanted = counts.cpu().sum((1, 2)).argsort(descending=True, stable=True)
    assert torch.equal(order, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_in_a_ragged_batch(kind, kernel):
    mask = every_kind(100)[kind]
    if kind == "tree_verification":
        mask = masks.TreeMask.from_parents([94, 60, 23], [-1, 0, 0, 1, -1, 4])
    case = cached("int8", [100, 77, 30], seed=1)
    check(kernel, case, mask, [(90, 100), (61, 77), (29, 30)])


@pytest.mark.parametrize("name", sorted(KERNEL_FORMATS))
def test_formats_in_prefill(name, kernel):
    case = cached(name, [80, 41], q_heads=6, head_dim=48 if "int4" not in name else 32, seed=2)
    check(kernel, case, masks.prefix_lm_document([(9, 33), (20, 47)]), [(3, 80), (0, 41)])


@pytest.mark.parametrize("name", ["none", "int4", "k8v4"])
def test_a_mask_a_head_and_a_request(name, kernel):
    noise = torch.Generator().manual_seed(3)
    bounds = torch.randint(0, 60, (2, 2, 55, 4), generator=noise).unflatten(-1, (2, 2))
    bounds = bounds.sort(-1).values.flatten(-2)
    columns = ColumnIntervals(bounds, False, open_end=False, lengths=(55, 40))
    cuts = torch.randint(0, 60, (2, 2, 20, 4), generator=noise).sort(-1).values
    rows = RowIntervals(cuts.unflatten(-1, (2, 2)), first=(30, 25), lengths=(20, 11))
    case = cached(name, [57, 44], seed=3, page_size=32)
    for mask in (columns, rows):
        check(kernel, case, mask, [(11, 57), (20, 44)])


def test_sinks_and_softcap(kernel):
    case = cached("fp8", [70], seed=4)
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])
    check(kernel, case, masks.sliding_window(70, 20), [(50, 70)], sinks=sinks, softcap=5.0)


def test_sinks_with_static_zero_points(kernel):
    case = cached("int4_static", [70], seed=4)
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])
    check(kernel, case, masks.causal_document([20, 50]), [(10, 70)], sinks=sinks)


def test_a_step_is_planned_once_and_again_when_a_length_or_the_mask_moves(monkeypatch):
    plans = []
    plain = triton_flash_mask.plan_tiles

    def counted(*given):
        plans.append(given)
        return plain(*given)

    monkeypatch.setattr(triton_flash_mask, "plan_tiles", counted)
    case = cached("int8", [60], seed=5)
    mask = masks.causal_document([20, 40])
    q, batch = case.step([(40, 60)])
    # As a captured graph has it: lengths move on the device.
    layer, batch = to_device(case.layer), derive(to_gpu(batch))

    def plans_of(mask, batch):
        before = len(plans)
        for _ in range(3):
            triton_attend(q.to(DEVICE), layer, batch, AttendParams(0.2, mask))
        return len(plans) - before

    assert plans_of(mask, batch) == 1
    assert plans_of(mask, batch) == 0
    assert plans_of(mask, derive(batch, page_table=batch.page_table.clone())) == 0
    assert plans_of(masks.causal_document([20, 40]), batch) == 1
    batch.context_lens.add_(-1)
    assert plans_of(mask, batch) == 1
    lowered(mask, q.to(DEVICE).device).bounds[..., 0] += 1
    assert plans_of(mask, batch) == 1
    assert plans_of(mask, derive(batch, context_lens=batch.context_lens.clone())) == 1
    with torch.inference_mode():
        inference = derive(batch, context_lens=batch.context_lens.clone())
        assert plans_of(mask, inference) == 3


@pytest.mark.parametrize("new", [1, 5])
def test_splits_of_a_decode_are_one_softmax(new):
    case = cached("int8", [330, 40], seed=5)
    mask = masks.causal_blockwise([64, 130, 136])
    q, batch = case.step([(330 - new, 330), (40 - new, 40)])
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], device=DEVICE)
    params = AttendParams(0.2, mask, sinks=sinks)
    layer, batch = to_device(case.layer), to_gpu(batch)
    one = triton_attend(q.to(DEVICE), layer, batch, params, splits=1)
    for splits in (2, 7):
        cut = triton_attend(q.to(DEVICE), layer, batch, params, splits=splits)
        assert relative(cut[0], one[0]) < 2e-3
        torch.testing.assert_close(cut[1], one[1], atol=1e-4, rtol=1e-4)


def test_rows_that_see_nothing(kernel):
    case = cached("int8", [50], seed=6)
    ranges = torch.zeros(1, 1, 50, 1, 2, dtype=torch.int32)
    ranges[0, 0, ::3, 0] = torch.tensor([5, 21], dtype=torch.int32)
    check(kernel, case, RowIntervals(ranges), [(0, 50)])
    check(kernel, case, RowIntervals(torch.zeros_like(ranges)), [(0, 50)])


def test_tiles_outside_the_mask_are_not_read():
    """Poisoned codes and scales in every page that no query sees leave no trace."""
    case = cached("int8", [256], page_size=64, seed=7)
    mask = masks.document([64, 128, 64])
    q, batch = case.step([(70, 190)])
    params = AttendParams(0.2, mask)
    layer = to_device(case.layer)
    clean, _ = triton_attend(q.to(DEVICE), layer, to_gpu(batch), params)
    for half in (layer.key, layer.value):
        half.scale[case.tables[0][0]] = torch.nan
    poisoned, _ = triton_attend(q.to(DEVICE), layer, to_gpu(batch), params)
    assert torch.equal(clean, poisoned)
