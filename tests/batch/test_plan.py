"""The ragged batch record, by its module's own example."""

import pytest
import torch

from quantpage.batch import one_more, plan_batch

pytestmark = pytest.mark.pure
TABLES = [[7], [2, 4], [1, 9, 3]]


def test_the_worked_example():
    batch = plan_batch([5, 1, 3], [5, 21, 33], TABLES, 16)
    assert batch.query_starts.tolist() == [0, 5, 6, 9]
    assert batch.context_lens.tolist() == [5, 21, 33]
    assert batch.page_table.tolist() == [[7, 0, 0], [2, 4, 0], [1, 9, 3]]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 20, 30, 31, 32]
    assert batch.slots.tolist() == [112, 113, 114, 115, 116, 68, 158, 159, 48]
    assert (batch.num_tokens, batch.num_requests) == (9, 3)
    assert (batch.max_query_len, batch.max_context_len) == (5, 33)


def test_exact_tables_may_have_holes():
    batch = plan_batch([1], [49], [[1, 9, 3, 4]], 16, exact_tables=[[0, -1, 6, 5]])
    assert batch.exact.page_table.tolist() == [[0, -1, 6, 5]]
    assert batch.exact.slots.tolist() == [80]


def test_an_empty_step():
    batch = plan_batch([], [], [], 16)
    assert (batch.num_tokens, batch.max_query_len, batch.max_context_len) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], [1], [[0]]), "one entry a request, got 2, 1, 1"),
        (([6], [5], [[0]]), r"query_lens\[0\]: expected 0..context 5, got 6"),
        (([1], [17], [[0]]), r"page_tables\[0\]: expected 2 pages for 17 tokens, got 1"),
        (([1], [5], [[-1]]), r"page_tables\[0\]: expected page ids of at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_batch(*arguments, 16)


def test_pages_that_were_given_back_are_nobodys():
    tables = [[0, 0, 3], [0, 4]]
    with pytest.raises(ValueError, match="a page that nobody else holds"):
        plan_batch([1, 17], [48, 32], tables, 16)
    plan = plan_batch([1, 17], [48, 32], tables, 16, first_pages=[2, 0])
    assert plan.largest_page == 4
    for wrong, said in (([2], "one a request"), ([4, 0], r"first_pages\[0\]: expected 0..3")):
        with pytest.raises(ValueError, match=said):
            plan_batch([1, 17], [48, 32], tables, 16, first_pages=wrong)


FIELDS = ("query_starts", "context_lens", "page_table", "slots", "positions")
NEAR = [[0, 4, 6], [3, 2, -1]]


def decode(contexts, near=None):
    return plan_batch([1, 1], contexts, [[7, 5, 9], [2, 4, 1]], 16, exact_tables=near)


@pytest.mark.parametrize("near", [None, NEAR])
def test_one_more_token_each_is_what_its_own_plan_says(near):
    plan = decode([33, 18], near)
    for contexts in zip(range(34, 48), range(19, 33), strict=True):
        plan, own = one_more(plan), decode(contexts, near)
        for name in FIELDS:
            assert torch.equal(getattr(plan, name), getattr(own, name))
        if near is not None:
            assert torch.equal(plan.exact.page_table, own.exact.page_table)
            assert torch.equal(plan.exact.slots, own.exact.slots)
        assert (plan.query_lens, plan.host_context_lens) == (own.query_lens, own.host_context_lens)
        assert (plan.largest_page, plan.largest_exact_page) == (
            own.largest_page,
            own.largest_exact_page,
        )
    # The second request's next token begins a page.
    assert contexts[1] == 32 and one_more(plan) is None


def test_one_more_follows_only_from_what_was_checked():
    assert one_more(plan_batch([2], [5], [[0]], 16)) is None
    written = plan_batch([1], [5], [[0]], 16)
    written.page_table[0, 0] = 3
    assert one_more(written) is None
    made = one_more(plan_batch([1], [5], [[0]], 16))
    made.check_unchanged()
    made.slots[0] = 77
    with pytest.raises(ValueError, match=r"slots\[0\]: expected 5"):
        made.check_unchanged()


def test_slots_that_are_skipped_stay_so():
    plan = decode([33, 18])
    plan.slots[1] = -1
    plan.check_unchanged()
    assert one_more(plan).slots.tolist() == [9 * 16 + 1, -1]


@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 3), (1, 3), (2, 4), (0, 4)])
def test_a_part_is_the_step_of_its_requests_alone(first, end):
    news, contexts = (3, 0, 20, 1), (35, 16, 20, 49)
    tables = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    near = [[11, 12, 13], [14], [15, 16], [17, -1, 18, 19]]
    given = [*zip(news, contexts, tables, near, (1, 0, 0, 1), strict=True)]

    def plan(requests):
        new, context, table, exact, firsts = zip(*requests, strict=True)
        return plan_batch(new, context, table, 16, exact_tables=exact, first_pages=firsts)

    whole = plan(given)
    with torch.inference_mode():
        part = whole.part(first, end)
        assert whole.part(first, end) is part
    assert (part is whole) == (end - first == 4)
    alone = plan(given[first:end])
    for name in ("query_lens", "host_context_lens", "first_pages", "page_size"):
        assert getattr(part, name) == getattr(alone, name)
    exact = part.exact
    for got, wanted in (
        *((getattr(part, x), getattr(alone, x)) for x in ("query_starts", "context_lens")),
        *((getattr(part, x), getattr(alone, x)) for x in ("slots", "positions")),
        (exact.slots, alone.exact.slots),
        (part.page_table[:, : alone.page_table.shape[1]], alone.page_table),
        (exact.page_table[:, : alone.exact.page_table.shape[1]], alone.exact.page_table),
    ):
        assert torch.equal(got, wanted)
        # What kernels are given begins as aligned as any tensor, and torch counts writes to it.
        assert got.storage_offset() == 0 and not got.is_inference()
