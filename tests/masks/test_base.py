"""Causality, windows and sink tokens, and masks that are made anew from themselves."""

import pytest
import torch

from quantpage.masks import CausalMask, ColumnIntervals, FullMask, RowIntervals, TreeMask
from tests.masks.drawn import Strided, every_kind

pytestmark = pytest.mark.cpu
KEYS = 23


@pytest.mark.parametrize("sink_tokens", [0, 1, 3])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 22, 23, 40])
def test_key_range_is_what_the_queries_see_and_no_less(window, sink_tokens):
    mask = CausalMask(window, sink_tokens if window else 0)
    for first in range(KEYS):
        for last in (first, min(first + 4, KEYS - 1)):
            seen = mask.materialize(torch.arange(first, last + 1), KEYS).any(0).nonzero().flatten()
            low, high = mask.key_range(first, last, KEYS)
            assert high == int(seen[-1]) + 1
            assert low == (0 if sink_tokens else int(seen[0]))
    assert FullMask().key_range(3, 4, KEYS) == (0, KEYS)


def test_a_window_counts_the_querys_own_key():
    seen = CausalMask(window=3).materialize(torch.arange(6), 6)
    assert seen.sum(1).tolist() == [1, 2, 3, 3, 3, 3]
    assert seen[5].tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("name", every_kind(16))
def test_a_mask_that_is_moved_says_the_same(name):
    """'cpu:0' is another name of the same device, so that the tensors are taken over anew."""
    mask = every_kind(16)[name]
    moved = mask.to("cpu:0")
    assert moved is not mask
    queries = torch.arange(40)
    assert torch.equal(moved.materialize(queries, 40), mask.materialize(queries, 40))


@pytest.mark.parametrize("name", every_kind(16))
def test_a_mask_that_is_built_from_its_own_tensors_says_the_same(name):
    """A window's bounds reach the number of described keys: they are no 'without end' then."""
    mask = every_kind(16)[name]
    if isinstance(mask, TreeMask):
        again = TreeMask(mask.prefix, mask.bits)
    elif isinstance(mask, RowIntervals):
        again = RowIntervals(mask.intervals, mask.first, mask.lengths)
    else:
        given = mask.startend_row_indices
        again = ColumnIntervals(given, mask.causal, open_end=False, lengths=mask.lengths)
    queries = torch.arange(40)
    assert torch.equal(again.materialize(queries, 40), mask.materialize(queries, 40))


def test_a_class_of_ones_own_needs_two_methods():
    mask = Strided(2, 3)
    assert (mask.kind, mask.form, mask.requests, mask.heads) == ("asked", mask, 1, 1)
    assert mask.to("cpu") is mask
    assert (mask.described(), mask.next_cut(5, 9), mask.next_cut(12, 9)) == (0, 5, 9)
    assert mask & FullMask() is mask
    assert FullMask() & mask is mask
    with pytest.raises(ValueError, match=r"one form .* got CausalMask & Strided"):
        CausalMask() & mask
    with pytest.raises(TypeError, match="unsupported operand"):
        mask & 3


def test_either_of_two_masks_may_know_what_both_show():
    class Nothing(Strided):
        def intersect(self, other):
            return self

    nothing = Nothing(1, 1)
    for other in (*every_kind(16).values(), CausalMask(), Strided(2, 3)):
        assert other & nothing is nothing
        assert nothing & other is nothing


@pytest.mark.parametrize("name", every_kind(16))
def test_what_a_mask_says_of_itself_is_what_its_form_says(name):
    mask = every_kind(16)[name]
    form = mask.form
    assert isinstance(form, ColumnIntervals | RowIntervals)
    queries = torch.arange(40)
    assert torch.equal(form.materialize(queries, 40), mask.materialize(queries, 40))
    assert (mask.requests, mask.heads) == (form.requests, form.heads)
    assert mask.described() == form.described() == 16
