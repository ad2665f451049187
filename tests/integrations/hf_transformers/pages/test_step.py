"""Plans of steps: one that follows from the step before says what a plan of its own would."""

import random

import pytest
import torch

from quantpage.cache import Reach
from quantpage.integrations.hf_transformers.pages import step as steps
from quantpage.integrations.hf_transformers.pages.memory import Memory
from quantpage.integrations.hf_transformers.pages.rows import Rows

pytestmark = pytest.mark.cpu
FIELDS = ("query_starts", "context_lens", "page_table", "slots", "positions")


def assert_same(plan, own):
    for name in FIELDS:
        assert torch.equal(getattr(plan, name), getattr(own, name)), name
    assert (plan.query_lens, plan.host_context_lens) == (own.query_lens, own.host_context_lens)
    assert plan.first_pages == own.first_pages
    if own.exact is not None:
        assert torch.equal(plan.exact.page_table, own.exact.page_table)
        assert torch.equal(plan.exact.slots, own.exact.slots)


def change(rows, length, draw):
    """Something that is not the next token; the rows and how long they are then."""
    if draw.random() < 0.5:
        rows.settle()
        length = max(1, length - draw.choice([1, 2, 5]))
        rows.crop(length)
    else:
        rows.select(draw.choice([[0, 0], [1, 0]]))
    return length


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("reach", [Reach(), Reach(window=40)])
def test_steps_after_steps_rollbacks_and_forks(reach, exact, monkeypatch):
    made = []
    monkeypatch.setattr(
        steps, "plan_batch", lambda *a, plan=steps.plan_batch: made.append(0) or plan(*a)
    )
    rows, draw = Rows(Memory(16, {reach: exact})), random.Random(0)
    rows.begin(2)
    length, asked = 0, 0
    for _ in range(300):
        if length > 8 and draw.random() < 0.1:
            length = change(rows, length, draw)
        new = draw.choice([1, 1, 1, 1, 1, 1, 1, 2, 3]) if length else 20
        step = rows.step(length, new, None)
        own = steps.plan_part(rows.tables[reach], rows.memory.shelves[reach], [new, new])
        assert_same(step.parts[reach].batch, own.batch)
        length, asked = length + new, asked + 1
    # Most of them follow, or nothing was tried here.
    assert len(made) - asked < 0.6 * asked
