"""Prompts over latent rows: which program has which keys."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpage.masks import CausalMask, FullMask
from quantpage.ops.attend.latent.prompts import ROW_COST, PromptShape, plan_prompts

pytestmark = pytest.mark.cpu
TILE = 16


@st.composite
def steps(draw):
    """Query and context lengths, and a shape."""
    query_lens = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=4)))
    context_lens = tuple(new + draw(st.integers(0, 400)) for new in query_lens)
    window = draw(st.sampled_from([None, 1, 20, 70]))
    causal = window is not None or draw(st.booleans())
    sink_tokens = draw(st.integers(0, 40)) if window is not None else 0
    heads, programs = draw(st.sampled_from([1, 3, 5, 16])), draw(st.integers(1, 12))
    return query_lens, context_lens, PromptShape(
        heads, 8, TILE, programs, causal, window, sink_tokens
    )  # fmt: skip


def tiles_seen(mask, positions, context):
    """Tiles with a key that one of these queries sees."""
    keys = mask.materialize(torch.tensor(positions), context).any(0).nonzero()[:, 0]
    return len(set((keys // TILE).tolist()))


@given(steps())
@settings(deadline=None, max_examples=60)
def test_every_query_meets_all_its_tiles_once(step):
    query_lens, context_lens, shape = step
    mask = CausalMask(shape.window, shape.sink_tokens) if shape.causal else FullMask()
    plan = plan_prompts(query_lens, context_lens, shape)
    begins = np.cumsum([0, *query_lens])
    met, slots = {}, []
    for request, place, seen, tokens, head, first, end, slot in plan.pieces.tolist():
        context, new = context_lens[request], query_lens[request]
        token = place - begins[request]
        rows = range(
            token * shape.heads + head,
            min(token * shape.heads + head + shape.rows, (token + tokens) * shape.heads),
        )
        assert 0 <= head < shape.heads and token >= 0 and token + tokens <= new
        assert (rows[-1]) // shape.heads == token + tokens - 1
        position = context - new + token
        assert seen == (position + tokens if shape.causal else context)
        met.setdefault((request, rows), []).append((first, end, slot))
        slots += [slot] * (slot >= 0)
    covered = {}
    for (request, rows), pieces in met.items():
        first_token, last_token = rows[0] // shape.heads, rows[-1] // shape.heads
        start = context_lens[request] - query_lens[request]
        positions = list(range(start + first_token, start + last_token + 1))
        pieces.sort()
        assert pieces[0][0] == 0
        assert pieces[-1][1] == tiles_seen(mask, positions, context_lens[request])
        assert all(a[1] == b[0] for a, b in pairwise(pieces))
        if len(pieces) == 1:
            assert pieces[0][2] == -1
        else:
            own = [slot for *_, slot in pieces]
            assert own == list(range(own[0], own[0] + len(own)))
            assert [own[0], len(own), request, rows[0]] in plan.cuts.tolist()
        for row in rows:
            assert (request, row) not in covered
            covered[request, row] = True
    assert len(covered) == sum(query_lens) * shape.heads
    assert sorted(slots) == list(range(plan.slots)) and plan.slots <= 2 * shape.programs
    assert plan.starts[0] == 0 and plan.starts[-1] == len(plan.pieces)
    assert (np.diff(plan.starts) >= 0).all() and len(plan.starts) == shape.programs + 1


def busiest(plan):
    """Tiles of the program that has most, and of all evenly shared."""
    cost = plan.pieces[:, 6] - plan.pieces[:, 5] + ROW_COST
    ends = np.concatenate([[0], np.cumsum(cost)])[plan.starts]
    return np.diff(ends).max(), cost.sum() / (len(plan.starts) - 1)


@pytest.mark.parametrize(
    "query_lens,context_lens,heads,most",
    [
        ((4096,), (4096,), 128, 1.02),
        ((512,), (32768,), 16, 1.1),
        ((512,), (32768,), 128, 1.1),
        ((17,), (131072,), 16, 1.1),
        ((140,), (32768,), 64, 1.15),
        # Most of it is one request's decode.
        ((256, *[1] * 31), (256, 131072, *[4096] * 30), 16, 1.3),
    ],
    ids=str,
)
def test_programs_are_done_together(query_lens, context_lens, heads, most):
    plan = plan_prompts(query_lens, context_lens, PromptShape(heads, 64, 64, 132))
    longest, even = busiest(plan)
    assert longest < most * even


def test_a_fresh_prompt_walks_half_of_a_square():
    plan = plan_prompts((4096,), (4096,), PromptShape(128, 64, 64, 132))
    tiles = (plan.pieces[:, 6] - plan.pieces[:, 5]).sum()
    assert tiles == 2 * sum(-(-(token + 1) // 64) for token in range(4096))
