"""The ragged batch record, by its module's own example."""

import pytest

from quantpage.batch import plan_batch

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
