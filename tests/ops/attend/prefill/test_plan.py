"""The plan of a prefill step: every visible key once, every workspace row written, work even."""

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from quantpage.masks import CausalMask
from quantpage.ops.attend.flash.tiles import DenseTile
from quantpage.ops.attend.prefill.plan import (
    DenseShape,
    plan_pages,
    plan_passes,
    schedule,
)

pytestmark = pytest.mark.pure
TILE = DenseTile(rows=12, keys=8, stages=2)


def shape(**given):
    return DenseShape(**({"kv_heads": 3, "group": 2, "row_bytes": 4, "tile": TILE} | given))


def workspace(each):
    """Which (request, key) each row holds; request -1 for zeros, -2 for rows that nobody wrote."""
    rows = np.full((each.rows, 2), -2)
    for request, first, count, end, row in each.spans:
        assert count <= each.max_span
        for offset in range(count):
            assert rows[row + offset, 0] == -2, "a row was written twice"
            key = first + offset
            rows[row + offset] = (request, key) if key < end else (-1, -1)
    coded = int((rows[:, 0] != -2).sum())
    assert (rows[coded:, 0] == -2).all()
    for request, first, count, end, row in () if each.exact is None else each.exact.spans:
        assert count <= each.exact.max_span
        for offset, key in enumerate(range(first, first + count)):
            # In place of codes of the same keys, or behind all of them.
            was = tuple(rows[row + offset])
            assert was in ((request, key), (-1, -1)) if row < coded else was == (-2, -2)
            rows[row + offset] = (request, key) if key < end else (-1, -1)
    assert (rows[:, 0] != -2).all(), "a row was left as it was"
    return rows


def covered(passes, given):
    """How often (request, packed row, kv_head, key) is computed, and that the key is there."""
    seen = {}
    for each in passes:
        rows = workspace(each)
        tiles = [tile for tile in each.work.order.flatten() if tile >= 0]
        assert sorted(tiles) == list(range(len(each.work.items) * each.heads))
        sink_rows = given.sink_tiles * TILE.keys
        for tile in tiles:
            item, head = each.work.items[tile // each.heads], tile % each.heads
            _, new, _, first_row, ws_row, base, end, request, _ = item
            held = {key: ws_row + key for key in range(sink_rows)}
            held |= {key: ws_row + sink_rows + key - base for key in range(base, end)}
            for row in range(first_row, min(first_row + TILE.rows, new * given.group)):
                for key, at in held.items():
                    if tuple(rows[at]) == (request, key):
                        pair = (request, row, each.head0 + head, key)
                        seen[pair] = seen.get(pair, 0) + 1
    return seen


@pytest.mark.parametrize(
    ("queries", "contexts", "more"),
    [
        ((5, 0, 3), (5, 9, 20), {}),
        ((20,), (33,), {"cap": 300, "processors": 1}),
        ((3,), (90,), {"cap": 300, "processors": 64}),
        ((3, 4, 2), (30, 17, 25), {"cap": 500}),
        ((2,), (130,), {"processors": 64}),
        ((9, 2), (40, 30), {"window": 7}),
        ((9, 2), (40, 30), {"window": 6, "sink_tokens": 3}),
        ((9, 12), (40, 12), {"window": 30, "sink_tokens": 11}),
        ((9,), (60,), {"window": 40, "sink_tokens": 3, "cap": 300}),
    ],
)
@pytest.mark.parametrize("persistent", [True, False])
def test_every_visible_key_once(queries, contexts, more, persistent):
    given = shape(persistent=persistent, **more)
    passes = plan_passes(queries, contexts, given)
    seen = covered(passes, given)
    mask = CausalMask(given.window, given.sink_tokens)
    for request, (new, context) in enumerate(zip(queries, contexts, strict=True)):
        shown = mask.materialize(torch.arange(context - new, context), context)
        for row in range(new * given.group):
            for head in range(given.kv_heads):
                for key in range(context):
                    times = seen.pop((request, row, head, key), 0)
                    if shown[row // given.group, key]:
                        assert times == 1, (request, row, head, key)
    # What is computed beside that is masked, and shown to another query of the request.
    for request, _, _, key in seen:
        first = contexts[request] - queries[request]
        assert key < contexts[request]
        assert given.window is None or key < given.sink_tokens or key > first - given.window


@pytest.mark.parametrize("page", [4, 16])
@pytest.mark.parametrize(
    ("queries", "contexts", "more"),
    [
        ((5, 0, 3), (5, 9, 20), {}),
        ((20, 1), (33, 40), {"cap": 300, "processors": 1}),
        ((3,), (90,), {"cap": 700, "processors": 64}),
        ((3,), (90,), {"cap": 400, "processors": 64}),
        ((3, 4, 2), (30, 17, 25), {"cap": 500}),
        ((2,), (130,), {"processors": 64}),
        ((9, 12), (40, 12), {"window": 30, "sink_tokens": 11}),
        ((9, 12), (40, 12), {"window": 7}),
    ],
)
def test_exact_pages_lie_beside_the_codes(queries, contexts, more, page):
    given = shape(exact_page=page, **more)
    passes = plan_passes(queries, contexts, given)
    near = []
    for each in passes:
        rows, made = workspace(each), each.exact
        exact = {row + at for *_, count, _, row in made.spans for at in range(count)}
        for _, _, _, _, row, base, end, request, _ in each.work.items:
            # Whoever reads a key of the first page among the codes reads it exactly.
            behind = row + given.sink_tiles * TILE.keys
            held = {key: row + key for key in range(given.sink_tiles * TILE.keys)}
            held |= {key: behind + key - base for key in range(base, end)}
            for key, at in held.items():
                if tuple(rows[at]) == (request, key):
                    assert (at in exact) == (key < page), (request, key)
        assert (made.near is None) == each.carried
        for request in () if made.near is None else {*each.work.items[:, 7]}:
            positions = np.arange(contexts[request] - queries[request], contexts[request])
            first = max(positions[0] // page - 1, 0) * page
            for key in range(first, contexts[request]):
                at = made.near[request] + key - first
                assert at in exact and tuple(rows[at]) == (request, key)
            near += [(int(request), each.head0 + head) for head in range(each.heads)]
    prompts = [request for request, new in enumerate(queries) if new]
    assert sorted(near) == [(request, head) for request in prompts for head in range(3)]


def test_the_cap_is_kept_and_partials_are_carried():
    given = shape(cap=300, processors=64)
    passes = plan_passes((3,), (90,), given)
    assert all(each.rows * each.heads * given.row_bytes <= 300 for each in passes)
    assert [each.carried for each in passes] == [False] + [True] * (len(passes) - 1)
    assert [each.final for each in passes] == [False] * (len(passes) - 1) + [True]


@settings(max_examples=200, deadline=None)
@drawn(st.data())
def test_what_a_step_works_in_is_bounded(data):
    """As docs/memory.md says it, for an engine that sets memory aside."""
    lens = st.lists(st.integers(0, 200), min_size=1, max_size=4)
    queries = (*data.draw(lens), data.draw(st.integers(1, 200)))
    contexts = tuple(new + data.draw(st.integers(0, 600)) for new in queries)
    given = shape(
        cap=data.draw(st.integers(100, 4000)),
        processors=data.draw(st.integers(1, 64)),
        persistent=data.draw(st.booleans()),
        window=data.draw(st.sampled_from([None, 30])),
        exact_page=data.draw(st.sampled_from([0, 0, 4, 16])),
    )
    most = max(-(-context // TILE.keys) for context in contexts) * TILE.keys
    if given.exact_page:
        most += max(queries) + 2 * given.exact_page
    a_head = most * given.row_bytes
    tokens, q_heads = sum(queries), given.kv_heads * given.group
    for each in plan_passes(queries, contexts, given):
        assert each.rows * each.heads * given.row_bytes <= max(given.cap, a_head)
        if each.work.parts > 1:
            rows = each.work.parts * tokens * q_heads
            assert rows <= given.processors * TILE.rows


def test_few_tiles_on_a_long_context_are_split():
    work = plan_pages((2,), (130,), shape(processors=64))
    assert work.parts == 2
    assert plan_pages((2,), (130,), shape(processors=64), members=(0,)).parts == 1
    assert plan_pages((2,), (30,), shape(processors=64)).parts == 1


def test_rounds_are_even():
    rng = np.random.default_rng(0)
    for cost in (np.arange(1, 129.0), rng.integers(1, 100, 300).astype(float)):
        order = schedule(cost, 8, 132, 2**23)
        load = np.where(order >= 0, np.append(cost + 1.5, 0)[order // 8], 0).sum(0)
        assert sorted(order[order >= 0]) == list(range(len(cost) * 8))
        assert load.max() < 1.1 * load.mean()


def test_one_long_item_is_not_left_for_the_end():
    cost = np.array([1.0] * 200 + [500.0])
    order = schedule(cost, 4, 16, 2**30)
    assert all(tile // 4 == 200 for tile in order[0, :4])
