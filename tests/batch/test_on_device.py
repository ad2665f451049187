"""Steps from tensors: those that lists give, bounds where only the device knows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpage.batch import plan_batch, plan_on_device

pytestmark = pytest.mark.cpu

TENSORS = ("query_starts", "context_lens", "page_table", "slots", "positions")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tensors_give_the_step_that_lists_give(data):
    page_size = data.draw(st.sampled_from([16, 64]))
    contexts = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))
    new = [data.draw(st.integers(0, context)) for context in contexts]
    pages = -(-160 // page_size)
    order = torch.randperm(pages * len(contexts)).view(len(contexts), pages)
    exact = order.flip(0) if data.draw(st.booleans()) else None
    listed = plan_batch(
        new, contexts, order.tolist(), page_size,
        exact_tables=None if exact is None else exact.tolist(),
    )  # fmt: skip
    starts = torch.tensor([0, *new]).cumsum(0).int()
    bounds = [context + data.draw(st.integers(0, 9)) for context in contexts]
    made = plan_on_device(
        starts,
        torch.tensor(contexts, dtype=torch.int32),
        order.int(),
        page_size,
        new,
        bounds,
        None if exact is None else exact.int(),
    )
    for name in TENSORS:
        assert torch.equal(getattr(made, name), getattr(listed, name)), name
    if exact is not None:
        assert torch.equal(made.exact.slots, listed.exact.slots)
        assert torch.equal(made.exact.page_table, listed.exact.page_table)
    assert made.query_lens == listed.query_lens
    assert made.host_context_lens == tuple(bounds)
    assert made.bounded == any(a < b for a, b in zip(contexts, bounds, strict=True))


def test_nothing_is_read_back():
    """A tensor without numbers raises where it is read."""
    given = [torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((3,), (2,), (2, 4))]
    plan = plan_on_device(*given, 16, (5, 1), longest=60)
    assert (plan.num_tokens, plan.max_context_len, plan.bounded) == (6, 60, True)
    assert plan.slots.shape == plan.positions.shape == (6,)
    with pytest.raises(RuntimeError):
        plan.slots.tolist()


STARTS, LENS = torch.tensor([0, 5, 6], dtype=torch.int32), torch.tensor([5, 21], dtype=torch.int32)
TABLE = torch.tensor([[7, 3], [2, 4]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: STARTS.long()}, "query_starts: expected int32 of one dimension, got torch.int64"),
        ({1: LENS[:1]}, "expected 3 and 2 numbers for 2 query_lens, got 3 and 1"),
        ({1: LENS - 1}, "context"),
        ({2: TABLE.long()}, "page_table: expected torch.int32"),
        ({4: (5, 2)}, "query_starts"),
        ({5: 90}, "page_table: expected 6 columns for contexts of up to 90 tokens, got 2"),
        ({5: 20}, "context"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, said):
    arguments = [STARTS, LENS, TABLE, 16, (5, 1), 32]
    assert plan_on_device(*arguments).slots.tolist() == [112, 113, 114, 115, 116, 68]
    for at, value in change.items():
        arguments[at] = value
    with pytest.raises(ValueError, match=said):
        plan_on_device(*arguments)
