"""Masks that hypothesis draws, and one of every kind."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from quantpage import masks
from quantpage.masks import END, ColumnIntervals, Mask, RowIntervals


@dataclass(frozen=True, slots=True)
class Strided(Mask):
    """A mask of a user's own, that no list of intervals a key can say: docs/adding-a-mask.md."""

    window: int
    stride: int

    def visible(self, queries, keys, request=0, kv_head=0):
        behind = queries[:, None] - keys[None, :]
        return (behind >= 0) & ((behind < self.window) | (keys % self.stride == 0))

    def key_range(self, first_query, last_query, keys, request=0):
        return 0, min(last_query + 1, keys)


FORMS = [(1, True), (2, True), (2, False), (4, False)]


def every_kind(tokens: int, seed: int = 0) -> dict[str, Mask]:
    """One mask of each kind over ``tokens`` tokens (at least 12)."""
    third, half = tokens // 3, tokens // 2
    parts = [third, 1, tokens - third - 1]
    noise = torch.Generator().manual_seed(seed)
    kept = torch.randint(1, tokens, (tokens,), generator=noise) + torch.arange(tokens)
    return {
        "causal": masks.causal(tokens),
        "full": masks.full(tokens),
        "sliding_window": masks.sliding_window(tokens, 5),
        "causal_document": masks.causal_document(parts),
        "document": masks.document(parts),
        "shared_question": masks.shared_question(third, [half - third, tokens - half]),
        "global_sliding_window": masks.global_sliding_window(tokens, 3, 4),
        "causal_blockwise": masks.causal_blockwise(parts),
        "prefix_lm": masks.prefix_lm(tokens, third),
        "prefix_lm_document": masks.prefix_lm_document([(third, half), (2, tokens - half)]),
        "qk_sparse": masks.qk_sparse(tokens, [(third, 2), (half, 3)]),
        "random_eviction": masks.random_eviction(kept),
        "image_spans": masks.image_spans(tokens, [(2, third), (half, tokens - 1)]),
        "block_diffusion": masks.block_diffusion(tokens, 4, prompt=third),
        "tree_verification": masks.tree_verification(tokens - 6, [-1, 0, 0, 1, -1, 4]),
    }


@st.composite
def column_masks(draw, tokens: int, batch: int = 1, heads: int = 1) -> ColumnIntervals:
    """Any column mask of any form: bounds uniform, ends open now and then."""
    vectors, causal = draw(st.sampled_from(FORMS))
    seed = draw(st.integers(0, 2**31))
    noise = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, vectors)
    bounds = torch.randint(0, tokens + 3, shape, generator=noise)
    if vectors == 4 or (vectors == 2 and causal):
        bounds = bounds.unflatten(-1, (-1, 2)).sort(-1).values.flatten(-2)
    if draw(st.booleans()):
        last = 1 if (vectors == 4 or causal) else 0
        hole = torch.rand(shape[:-1], generator=noise) < 0.5
        bounds[..., last % vectors][hole] = END
    return ColumnIntervals(bounds, causal, open_end=False)


@st.composite
def row_masks(draw, tokens: int, batch: int = 1, heads: int = 1) -> RowIntervals:
    """Any row mask: up to three sorted ranges a query."""
    ranges = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    noise = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, tokens + 3, (batch, heads, tokens, 2 * ranges), generator=noise)
    return RowIntervals(cuts.sort(-1).values.unflatten(-1, (ranges, 2)))


def any_mask(tokens: int, batch: int = 1, heads: int = 1):
    """A drawn column or row mask."""
    return st.one_of(column_masks(tokens, batch, heads), row_masks(tokens, batch, heads))
