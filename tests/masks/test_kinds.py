"""Each kind against its definition, said pair by pair."""

import pytest
import torch

from quantpage import masks
from quantpage.masks import END

pytestmark = pytest.mark.cpu

N = 29
EVICTED = torch.tensor([j + 1 + (7 * j) % 11 for j in range(N)])
PARENTS = [-1, 0, 0, 2, -1, 1]


def part(i, lengths):
    """Which part a token is in, and the part's first token."""
    start = 0
    for number, length in enumerate(lengths):
        if i < start + length:
            return number, start
        start += length
    raise AssertionError


def ancestors(node):
    found = {node}
    while PARENTS[node] >= 0:
        node = PARENTS[node]
        found.add(node)
    return found


DOCS = [5, 1, 13, 10]
PREFIXES = [2, 1, 0, 10]


def prefix_documents(i, j):
    number, start = part(i, DOCS)
    return number == part(j, DOCS)[0] and (j <= i or j < start + PREFIXES[number])


KINDS = {
    "causal": (masks.causal(N), lambda i, j: j <= i),
    "full": (masks.full(N), lambda i, j: True),
    "sliding_window": (masks.sliding_window(N, 6), lambda i, j: i - 6 < j <= i),
    "causal_document": (
        masks.causal_document(DOCS),
        lambda i, j: part(i, DOCS) == part(j, DOCS) and j <= i,
    ),
    "document": (masks.document(DOCS), lambda i, j: part(i, DOCS) == part(j, DOCS)),
    "shared_question": (
        masks.shared_question(8, [7, 14]),
        lambda i, j: j <= i and (j < 8 or part(i, [8, 7, 14]) == part(j, [8, 7, 14])),
    ),
    "global_sliding_window": (
        masks.global_sliding_window(N, 3, 4),
        lambda i, j: i < 3 or j < 3 or abs(i - j) <= 4,
    ),
    "causal_blockwise": (
        masks.causal_blockwise(DOCS),
        lambda i, j: j <= i and (part(i, DOCS) == part(j, DOCS) or i >= N - DOCS[-1]),
    ),
    "prefix_lm": (masks.prefix_lm(N, 9), lambda i, j: j < 9 or j <= i),
    "prefix_lm_document": (
        masks.prefix_lm_document(list(zip(PREFIXES, DOCS, strict=True))),
        prefix_documents,
    ),
    "qk_sparse": (
        masks.qk_sparse(N, [(6, 4), (15, 5)]),
        lambda i, j: j <= i and not (j < 6 <= i < 10) and not (6 <= j < 15 <= i < 20),
    ),
    "random_eviction": (
        masks.random_eviction(EVICTED),
        lambda i, j: j <= i < EVICTED[j],
    ),
    "image_spans": (
        masks.image_spans(N, [(3, 11), (11, 12), (20, 29)]),
        lambda i, j: j <= i or any(a <= i < b and a <= j < b for a, b in [(3, 11), (20, 29)]),
    ),
    "block_diffusion": (
        masks.block_diffusion(N, 4, prompt=7),
        lambda i, j: j <= i or (i >= 7 and j >= 7 and (i - 7) // 4 == (j - 7) // 4),
    ),
    "tree_verification": (
        masks.tree_verification(N - 6, PARENTS),
        lambda i, j: j <= i and (j < N - 6 or i < N - 6 or j - N + 6 in ancestors(i - N + 6)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_its_definition(kind):
    mask, rule = KINDS[kind]
    wanted = torch.tensor([[bool(rule(i, j)) for j in range(N)] for i in range(N)])
    assert torch.equal(mask.materialize(torch.arange(N), N), wanted)
    assert mask.kind == "interval"


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_causal_among_themselves(kind):
    mask, _ = KINDS[kind]
    seen = mask.materialize(torch.arange(N, N + 5), N + 5)
    assert torch.equal(seen[:, N:], torch.ones(5, 5, dtype=torch.bool).tril())
    assert not mask.materialize(torch.arange(N), N + 5)[:, N:].any()


def test_lengths_may_be_a_tensor():
    given = masks.causal_document(torch.tensor(DOCS))
    assert torch.equal(given.bounds, masks.causal_document(DOCS).bounds)


def test_new_tokens_go_on_with_the_last_document():
    for mask in (masks.causal_document(DOCS), masks.document(DOCS)):
        seen = mask.materialize(torch.tensor([N]), N + 1)[0]
        assert seen.nonzero().flatten().tolist() == list(range(N - DOCS[-1], N + 1))


def test_a_window_goes_on_sliding_over_described_keys():
    seen = masks.sliding_window(N, 6).materialize(torch.tensor([N + 1]), N + 2)[0]
    assert seen.nonzero().flatten().tolist() == list(range(N - 4, N + 2))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: masks.sliding_window(9, 0), "window: expected a whole number of at least 1"),
        (lambda: masks.sliding_window(9, 2.5), "window: expected a whole number .*, got 2.5"),
        (lambda: masks.CausalMask(2.5), "window: expected a whole number of at least 1, got 2.5"),
        (lambda: masks.CausalMask("5"), "window: expected a whole number of at least 1, got '5'"),
        (lambda: masks.CausalMask(5, 1.5), "sink_tokens: expected a whole number"),
        (lambda: masks.causal(-1), "tokens: expected a whole number of at least 0, got -1"),
        (lambda: masks.full(1.5), "tokens: expected a whole number of at least 0, got 1.5"),
        (lambda: masks.document([2.5, 3]), r"lengths\[0\]: expected a whole number"),
        (lambda: masks.prefix_lm(9, 2.5), "prefix: expected 0..9, got 2.5"),
        (lambda: masks.causal_document([4, 0, 2]), r"lengths\[1\]: expected a whole .* 1, got 0"),
        (lambda: masks.document([]), "lengths: expected at least one document, got none"),
        (lambda: masks.prefix_lm(9, 10), "prefix: expected 0..9, got 10"),
        (
            lambda: masks.prefix_lm_document([(1, 4), (6, 5)]),
            r"documents\[1\] prefix: expected 0..5, got 6",
        ),
        (
            lambda: masks.image_spans(9, [(4, 6), (2, 3)]),
            r"spans\[1\] start: expected 6..9, got 2",
        ),
        (lambda: masks.image_spans(9, [(4, 11)]), r"spans\[0\] end: expected 4..9, got 11"),
        (lambda: masks.qk_sparse(9, [(3, 9)]), r"gaps\[0\] length: expected 0..6, got 9"),
        (
            lambda: masks.random_eviction(torch.tensor([1, 9, 2])),
            r"evicted_at\[2\]: expected a query after 2, got 2",
        ),
        (
            lambda: masks.random_eviction(torch.ones(3, 4)),
            r"evicted_at: expected \[tokens\] of int32 or int64, got \(3, 4\) of torch.float32",
        ),
        (
            lambda: masks.tree_verification(4, range(-1, 64)),
            "parents: expected .* 64 nodes, got 65",
        ),
        (lambda: masks.tree_verification(4, [-1, 1]), r"parents\[1\]: expected -1..0, got 1"),
    ],
)
def test_errors_name_the_offending_entry(build, said):
    with pytest.raises(ValueError, match=said):
        build()


def test_128k_keys_take_less_than_4_mib():
    tokens = 131072
    for mask in (
        masks.global_sliding_window(tokens, 16, 512),
        masks.causal_document([tokens // 8] * 8),
        masks.random_eviction(torch.full((tokens,), END)),
    ):
        held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
                for each in (mask.bounds, mask.startend_row_indices)}  # fmt: skip
        assert sum(held.values()) < 4 * 2**20
