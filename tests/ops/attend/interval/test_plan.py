"""The planner of interval masks: no visible pair is dropped, few tiles are visited in vain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpage import masks
from quantpage.masks import CausalMask
from quantpage.ops.attend.interval.plan import (
    EMPTY,
    FULL,
    PARTIAL,
    MaskTile,
    lower,
    plan_tiles,
    tile_kinds,
)
from tests.masks.drawn import any_mask, every_kind
from tests.ops.mask_cases import cached

pytestmark = pytest.mark.cpu

KINDS = sorted(every_kind(24))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_plan_never_drops_a_visible_pair(data):
    tokens = data.draw(st.integers(1, 70))
    mask = data.draw(any_mask(tokens))
    first = data.draw(st.integers(0, tokens))
    end = data.draw(st.integers(first + 1, tokens + 6))
    start = data.draw(st.integers(0, tokens))
    tile = data.draw(st.sampled_from([8, 16, 19]))
    kinds = tile_kinds(mask, (first, end), (start, tokens + 6), tile)
    seen = mask.materialize(torch.arange(first, end), tokens + 6)[:, start:]
    for kind, part in zip(kinds.tolist(), seen.split(tile, dim=1), strict=True):
        if kind == EMPTY:
            assert not part.any()
        if kind == FULL:
            assert part.all()


@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_the_kinds_waste_little(kind):
    mask = every_kind(192)[kind]
    exact = mask.draw(192, tile=(16, 16)).counts()
    kinds = torch.cat([tile_kinds(mask, (r, r + 16), (0, 192), 16) for r in range(0, 192, 16)])
    found = {name: int((kinds == code).sum()) for name, code in
             (("full", FULL), ("partial", PARTIAL), ("skipped", EMPTY))}  # fmt: skip
    # Bounds are sharp where intervals of a tile's keys begin or end together; between a global
    # token and a window, or where eviction is random, they may be loose.
    slack = 0 if kind not in ("global_sliding_window", "random_eviction", "qk_sparse") else 12
    for name, count in exact.items():
        assert abs(found[name] - count) <= slack, (name, found, exact)


def test_plan_lists_full_tiles_first_and_partial_ones_from_the_back():
    case = cached("int8", [200], page_size=64)
    _, batch = case.step([(150, 200)])
    plan = plan_tiles(masks.causal_document([70, 130]), batch, 2, MaskTile(32, 32))
    assert plan.items.tolist() == [[0, 0], [0, 32], [0, 64], [0, 96]]
    # Tokens 150..165 see keys 70..: tiles 2 (partly), 3, and 4 and 5 on the diagonal.
    assert plan.counts[0, 0].tolist() == [1, 3]
    assert plan.tiles[0, 0].tolist() == [3, -1, -1, -1, 5, 4, 2]


def test_lower_refuses_what_has_no_intervals():
    with pytest.raises(ValueError, match="mask: expected an interval mask, got CausalMask"):
        lower(CausalMask())
