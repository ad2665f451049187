"""Columns, rows and trees: what they mean, where they may be cut, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpage.masks import (
    END,
    CausalMask,
    ColumnIntervals,
    FullMask,
    RowIntervals,
    TreeMask,
)
from quantpage.masks.columns import NAMES
from tests.masks.drawn import FORMS, any_mask, column_masks, every_kind, row_masks

pytestmark = pytest.mark.cpu
N = 23


def flashmask(vectors, causal, tokens, noise):
    """Random startend_row_indices and the dense mask that FlashMask's paper gives them."""
    bounds = torch.randint(0, tokens + 1, (tokens, vectors), generator=noise)
    if vectors == 4 or causal:
        bounds = bounds.unflatten(-1, (-1, min(vectors, 2))).sort(-1).values.flatten(-2)
    rows = torch.arange(tokens)[:, None]
    get = dict(zip(NAMES[vectors, causal], bounds.unbind(-1), strict=True))
    lower = (rows >= get.get("LTS", tokens)) & (rows < get.get("LTE", torch.tensor(tokens)))
    upper = (rows >= get.get("UTS", torch.tensor(0))) & (rows < get.get("UTE", torch.tensor(0)))
    hidden = lower | upper
    if causal:
        hidden |= rows < torch.arange(tokens)
    return bounds, ~hidden


@pytest.mark.parametrize(("vectors", "causal"), FORMS)
def test_columns_are_flashmask(vectors, causal):
    noise = torch.Generator().manual_seed(vectors + causal)
    rows = [flashmask(vectors, causal, N, noise) for _ in range(6)]
    indices = torch.stack([bounds for bounds, _ in rows]).view(2, 3, N, vectors)
    mask = ColumnIntervals(indices.to(torch.int32), causal)
    assert mask.per_head
    for number, (_, wanted) in enumerate(rows):
        seen = mask.materialize(torch.arange(N), N, number // 3, number % 3)
        assert torch.equal(seen, wanted)


def test_a_bound_of_all_keys_means_without_end():
    bounds = torch.tensor([4, 2, 4, 4]).view(1, 1, 4, 1)
    queries = torch.arange(4, 6)
    assert ColumnIntervals(bounds).materialize(queries, 6).tolist() == [
        [True, False, True, True, True, False],
        [True, False, True, True, True, True],
    ]
    assert not ColumnIntervals(bounds, open_end=False).materialize(queries, 4).any()


def test_padded_batches_describe_their_own_length():
    bounds = torch.full((2, 1, 6, 1), 6)
    bounds[1, 0, :3, 0] = torch.tensor([3, 2, 3])
    bounds[1, 0, 3:, 0] = 0
    mask = ColumnIntervals(bounds, lengths=(6, 3))
    assert mask.materialize(torch.tensor([4]), 5, request=1).tolist() == [
        [True, False, True, True, True]
    ]
    with pytest.raises(ValueError, match=r"request: expected 0\.\.1, .* got 2"):
        mask.materialize(torch.tensor([0]), 5, request=2)


def test_offsets_honour_both_ends():
    offsets = torch.tensor([0, 3, 1, 3, 2, 3, 5, 8, 0, 9])
    mask = RowIntervals.from_offsets(offsets, [0, 3, 5], [3, 9])
    assert mask.materialize(torch.arange(3), 3).int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    rows = mask.materialize(torch.arange(6, 10), 10, request=1).int().tolist()
    assert rows == [
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
    with pytest.raises(ValueError, match="offsets: expected 10 integers, 2 a new token, got 8"):
        RowIntervals.from_offsets(offsets[:8], [0, 3, 5], [3, 9])


def test_a_tree_of_64_nodes_and_a_tree_a_request():
    chain = TreeMask.from_parents(5, range(-1, 63))
    causal = CausalMask().materialize(torch.arange(69), 69)
    assert torch.equal(chain.materialize(torch.arange(69), 69), causal)
    two = TreeMask.from_parents([4, 7], [[-1, -1], [-1, 0]])
    assert two.materialize(torch.tensor([5]), 6, request=0).int().tolist() == [[1, 1, 1, 1, 0, 1]]
    assert two.materialize(torch.tensor([8]), 9, request=1).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_key_range_holds_every_visible_key(data):
    mask = data.draw(any_mask(N, heads=data.draw(st.integers(1, 2))))
    first = data.draw(st.integers(0, N + 2))
    last = data.draw(st.integers(first, N + 3))
    keys = data.draw(st.integers(1, N + 4))
    low, high = mask.key_range(first, last, keys)
    assert 0 <= low <= high <= keys
    for head in range(2):
        seen = mask.materialize(torch.arange(first, last + 1), keys, 0, head).any(0)
        assert not seen[:low].any() and not seen[high:].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, N), st.integers(0, 9), st.integers(1, N), st.integers(0, 5))
def test_key_range_of_a_window_is_what_its_queries_see(first, more, window, sinks):
    """All of it and nothing else: pages before it are given back."""
    mask = CausalMask(window, sinks)
    keys = first + more + 1
    seen = mask.materialize(torch.arange(first, keys), keys).any(0).nonzero().flatten().tolist()
    assert mask.key_range(first, keys - 1, keys) == (seen[0], seen[-1] + 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_leaves_no_query_with_a_later_key(data):
    mask = data.draw(any_mask(N))
    start = data.draw(st.integers(0, N))
    seen = mask.materialize(torch.arange(N), N)
    good = [p for p in range(start, N + 1) if not seen[:p, p:].any()]
    assert mask.next_cut(start, N) == good[0]


def test_intervals_that_meet_hide_a_key_from_every_query_before_both():
    # Key 5 is hidden from queries 0 to 2 and 3 to 4: told in either order, 5 sees it first.
    for five in ([3, 5, 0, 3], [0, 3, 3, 5]):
        given = torch.tensor([[0, 0, 0, key] for key in range(5)] + [five])
        assert ColumnIntervals(given[None, None], causal=False).cuts(6).all()


def test_a_range_past_the_last_key_hinders_no_cut():
    mask = RowIntervals(torch.tensor([[5, 9], [0, 3], [1, 3]]).view(1, 1, 3, 1, 2))
    assert mask.next_cut(1, 3) == 1
    assert mask.next_cut(1, 9) == 9


def test_a_new_query_sees_no_later_key_that_the_last_described_one_saw():
    mask = RowIntervals(torch.tensor([[0, 1], [1, 9]]).view(1, 1, 2, 1, 2))
    seen = mask.materialize(torch.arange(1, 4), 6).int().tolist()
    assert seen == [[0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]


def test_cuts_of_the_kinds():
    kinds = every_kind(24)
    assert kinds["image_spans"].next_cut(3, 24) == 8
    assert kinds["prefix_lm"].next_cut(1, 24) == 8
    assert kinds["block_diffusion"].next_cut(9, 24) == 12
    assert kinds["causal"].next_cut(9, 24) == 9
    assert CausalMask().next_cut(9, 24) == 9
    assert FullMask().next_cut(9, 24) == 24
    assert FullMask().next_cut(0, 24) == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_and_shows_what_both_show(data):
    form = data.draw(st.sampled_from([column_masks, row_masks]))
    left = data.draw(form(N))
    right = data.draw(
        st.one_of(
            form(N, heads=2),
            st.just(CausalMask()),
            st.builds(CausalMask, st.integers(1, 9), st.integers(0, 4)),
            st.just(FullMask()),
        )
    )
    queries = torch.arange(N)
    wanted = left.materialize(queries, N, 0, 1) & right.materialize(queries, N, 0, 1)
    try:
        both = left & right
    except ValueError as error:
        assert form is column_masks
        assert "expected at most 2 hidden intervals" in str(error)
        holes = (~wanted).int().diff(dim=0, prepend=torch.zeros(1, N, dtype=torch.int32)) == 1
        assert (holes.sum(0) > 2).any() or _far_rows_differ(left, right)
        return
    assert torch.equal(both.materialize(queries, N, 0, 1), wanted)
    assert torch.equal((right & left).materialize(queries, N, 0, 1), wanted)


def _far_rows_differ(left, right):
    """The third hidden interval may lie past the N rows looked at."""
    far = torch.arange(N + 20)
    hidden = ~torch.stack(
        [left.materialize(far, N, 0, h) & right.materialize(far, N, 0, h) for h in (0, 1)]
    )
    first = torch.zeros(2, 1, N, dtype=torch.int32)
    return bool(((hidden.int().diff(dim=1, prepend=first) == 1).sum(1) > 2).any())


def test_and_keeps_causal_windows_and_refuses_two_forms():
    assert CausalMask(5) & CausalMask(3) == CausalMask(3)
    assert CausalMask() & CausalMask(3, 2) == CausalMask(3, 2)
    with pytest.raises(ValueError, match="same sink_tokens, got 1 & 2"):
        CausalMask(5, 1) & CausalMask(3, 2)
    kinds = every_kind(12)
    with pytest.raises(ValueError, match=r"masks of one form .* ColumnIntervals & TreeMask"):
        kinds["causal"] & kinds["tree_verification"]
    with pytest.raises(ValueError, match="masks of the same keys"):
        ColumnIntervals(torch.full((1, 1, 8, 1), 8), lengths=(7,)) & ColumnIntervals(
            torch.full((1, 1, 8, 1), 8)
        )


def columns(rows, causal=True, **options):
    return ColumnIntervals(torch.tensor(rows)[None, None], causal, **options)


def ranges(rows):
    return RowIntervals(torch.tensor(rows)[None, None])


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (
            lambda: ColumnIntervals(torch.zeros(4, 1, dtype=torch.int32)),
            r"startend_row_indices: expected rank 4, .* got shape \(4, 1\)",
        ),
        (
            lambda: columns([[0.5], [1.0]]),
            "startend_row_indices: expected int32 or int64, got torch.float32",
        ),
        (
            lambda: columns([[1, 2, 3]] * 2),
            r"expected 1 or 2 \(causal\) vectors a key, got 3",
        ),
        (
            lambda: columns([[1]] * 2, causal=False),
            r"expected 2 or 4 \(bidirectional\) vectors a key, got 1",
        ),
        (
            lambda: columns([[3], [-2], [3]]),
            r"startend_row_indices\[0, 0, 1, 0\]: expected a row in 0\.\.3, got -2",
        ),
        (
            lambda: columns([[3], [2], [4]]),
            r"startend_row_indices\[0, 0, 2, 0\]: expected a row in 0\.\.3, got 4",
        ),
        (
            lambda: columns([[1, 2], [2, 1], [3, 3]]),
            r"startend_row_indices\[0, 0, 1\]: expected LTS <= LTE, got 2 > 1",
        ),
        (
            lambda: columns([[1, 2, 0, 0], [2, 2, 1, 0]], causal=False),
            r"startend_row_indices\[0, 0, 1\]: expected UTS <= UTE, got 1 > 0",
        ),
        (lambda: columns([[1]], lengths=(1, 1)), "lengths: expected 1, one a batch row, got 2"),
        (lambda: columns([[1]], lengths=(2,)), r"lengths\[0\]: expected 0\.\.1, got 2"),
        (
            lambda: RowIntervals(torch.zeros(3, 2, dtype=torch.int32)),
            r"intervals: expected rank 5, .* got shape \(3, 2\)",
        ),
        (
            lambda: ranges([[[0, 1]], [[-1, 2]]]),
            r"intervals\[0, 0, 1, 0, 0\]: expected a key of at least 0, got -1",
        ),
        (
            lambda: ranges([[[0, 1]], [[3, 2]]]),
            r"intervals\[0, 0, 1, 0\]: expected start <= end, got \[3, 2\)",
        ),
        (
            lambda: ranges([[[0, 2], [2, 4]], [[5, 9], [2, 4]]]),
            r"intervals\[0, 0, 1, 1\]: expected ranges sorted and disjoint, .* 2 after an end of 9",
        ),
        (
            lambda: RowIntervals(torch.zeros(1, 1, 2, 1, 2, dtype=torch.int32), first=(-1,)),
            "first: expected 1 positions of at least 0",
        ),
        (
            lambda: TreeMask((3,), torch.tensor([[1, 1]])),
            r"bits\[0, 1\]: expected a node to see itself",
        ),
        (
            lambda: TreeMask((3,), torch.tensor([[3, 2]])),
            r"bits\[0, 0\]: expected only nodes before it and itself, got bit 1",
        ),
        (
            lambda: TreeMask.from_parents(3, [-1] * 65),
            "parents: expected at most 64 nodes, got 65",
        ),
        (
            lambda: TreeMask.from_parents([3, 3], [[-1], [-1, 0]]),
            "parents: expected trees of one size",
        ),
    ],
)
def test_errors_name_the_offending_index(build, said):
    with pytest.raises(ValueError, match=said):
        build()


def test_an_open_window_needs_positions():
    assert int(columns([[END]], open_end=False).bounds[0, 0, 0, 0]) == END
