"""Who may see whom: each kind of docs/masks.md as a predicate, beside the mask that says the same.

A predicate speaks of queries at any position i and of *described* keys j < tokens; later keys are
seen by themselves and every query after them. Rows (``rows``, ``tree``) describe queries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from quantpage import masks

Predicate = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""Positions i [queries, 1] and j [1, keys], a kv_head -> who sees whom."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One request's mask, twice."""

    mask: masks.Mask
    sees: Predicate
    described: int | None
    """Keys that a column mask describes; None: the predicate speaks of all."""

    def visible(self, queries: np.ndarray, keys: int, head: int) -> np.ndarray:
        """[queries, keys]."""
        i, j = queries[:, None], np.arange(keys)[None]
        if self.described is None:
            return np.broadcast_to(self.sees(i, j, head), (len(queries), keys))
        told = self.sees(i, np.minimum(j, max(self.described - 1, 0)), head)
        return np.where(j < self.described, told, i >= j)


def together(each: list[Shown]) -> masks.Mask:
    """One mask of the requests of a step."""
    first = each[0].mask
    if all(one is each[0] for one in each) or first.kind != "interval":
        return first
    if isinstance(first, masks.ColumnIntervals):
        given = [one.mask.startend_row_indices for one in each]
        widest = max(plane.shape[2] for plane in given)
        padded = [
            torch.nn.functional.pad(plane, (0, 0, 0, widest - plane.shape[2])) for plane in given
        ]
        lengths = tuple(plane.shape[2] for plane in given)
        return masks.ColumnIntervals(torch.cat(padded), first.causal, False, lengths)
    raise AssertionError(f"masks of {type(first).__name__} are shared")


def draw(kind: str, tokens: int, heads: int, rng: np.random.Generator) -> Shown:
    """A mask of this kind that describes about so many tokens."""
    made = _DRAWN[kind](tokens, heads, rng)
    return Shown(*made)


SHARED = ("tree", "columns", "rows")
"""Whose shapes differ from draw to draw: one mask serves all requests of a case."""


def plain(window: int | None, sink_tokens: int) -> Shown:
    """Causal, perhaps in a window, the first tokens seen besides."""

    def sees(i, j, head):
        near = (i - j < window) | (j < sink_tokens) if window else True
        return (j <= i) & near

    return Shown(masks.CausalMask(window, sink_tokens), sees, None)


def everything() -> Shown:
    """Full."""
    return Shown(masks.FullMask(), lambda i, j, head: (i >= 0) & (j >= 0), None)


def _cut(tokens: int, rng, least: int = 1) -> list[int]:
    """Lengths of a few documents that sum to about ``tokens``."""
    parts = int(rng.integers(1, 5))
    return [max(least, int(x)) for x in rng.multinomial(tokens, np.ones(parts) / parts)]


def _places(lengths: list[int]):
    ends = np.cumsum(lengths)
    starts = ends - lengths
    start, end = np.repeat(starts, lengths), np.repeat(ends, lengths)
    return start, end, start == starts[-1]


def _causal(tokens, heads, rng):
    return masks.causal(tokens), lambda i, j, h: i >= j, tokens


def _full(tokens, heads, rng):
    return masks.full(tokens), lambda i, j, h: i >= 0 * j, tokens


def _sliding_window(tokens, heads, rng):
    window = int(rng.integers(1, tokens + 1))
    return masks.sliding_window(tokens, window), lambda i, j, h: (j <= i) & (i < j + window), tokens


def _causal_document(tokens, heads, rng):
    lengths = _cut(tokens, rng)
    _, end, last = _places(lengths)
    sees = lambda i, j, h: (i >= j) & ((i < end[j]) | last[j])  # noqa: E731
    return masks.causal_document(lengths), sees, sum(lengths)


def _document(tokens, heads, rng):
    lengths = _cut(tokens, rng)
    start, end, last = _places(lengths)
    sees = lambda i, j, h: (i >= start[j]) & ((i < end[j]) | last[j])  # noqa: E731
    return masks.document(lengths), sees, sum(lengths)


def _shared_question(tokens, heads, rng):
    question, lengths = int(rng.integers(0, tokens)), _cut(tokens, rng)
    _, end, last = _places(lengths)
    end = np.concatenate([np.zeros(question, int), end + question])
    last = np.concatenate([np.ones(question, bool), last])
    sees = lambda i, j, h: (i >= j) & ((i < end[j]) | last[j])  # noqa: E731
    return masks.shared_question(question, lengths), sees, question + sum(lengths)


def _global_sliding_window(tokens, heads, rng):
    wide, window = int(rng.integers(0, tokens + 1)), int(rng.integers(0, tokens))
    sees = lambda i, j, h: (i < wide) | (j < wide) | (np.abs(i - j) <= window)  # noqa: E731
    return masks.global_sliding_window(tokens, wide, window), sees, tokens


def _causal_blockwise(tokens, heads, rng):
    lengths = _cut(tokens, rng)
    _, end, last = _places(lengths)
    first = sum(lengths) - lengths[-1]
    sees = lambda i, j, h: (i >= j) & (last[j] | (i < end[j]) | (i >= first))  # noqa: E731
    return masks.causal_blockwise(lengths), sees, sum(lengths)


def _prefix_lm(tokens, heads, rng):
    prefix = int(rng.integers(0, tokens + 1))
    return masks.prefix_lm(tokens, prefix), lambda i, j, h: (i >= j) | (j < prefix), tokens


def _prefix_lm_document(tokens, heads, rng):
    lengths = _cut(tokens, rng)
    prefixes = [int(rng.integers(0, n + 1)) for n in lengths]
    start, end, last = _places(lengths)
    open_until = start + np.repeat(prefixes, lengths)

    def sees(i, j, h):
        inside = (i >= j) | ((j < open_until[j]) & (i >= start[j]))
        return inside & ((i < end[j]) | last[j])

    return masks.prefix_lm_document(list(zip(prefixes, lengths, strict=True))), sees, sum(lengths)


def _qk_sparse(tokens, heads, rng):
    firsts = np.unique(rng.integers(0, tokens, 3))
    gaps = [(int(f), int(rng.integers(0, tokens - f + 1))) for f in firsts]

    def sees(i, j, h):
        seen, before = i >= j, 0
        for first, length in gaps:
            seen = seen & ~((j >= before) & (j < first) & (i >= first) & (i < first + length))
            before = first
        return seen

    return masks.qk_sparse(tokens, gaps), sees, tokens


def _random_eviction(tokens, heads, rng):
    gone = np.arange(tokens) + 1 + rng.integers(0, tokens, tokens)
    gone[rng.random(tokens) < 0.3] = masks.END
    sees = lambda i, j, h: (i >= j) & (i < gone[j])  # noqa: E731
    return masks.random_eviction(torch.from_numpy(gone)), sees, tokens


def _image_spans(tokens, heads, rng):
    edges = np.unique(rng.integers(0, tokens + 1, 4))
    spans = [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    return masks.image_spans(tokens, spans), _spans(spans, tokens), tokens


def _block_diffusion(tokens, heads, rng):
    block, prompt = int(rng.integers(1, 33)), int(rng.integers(0, tokens + 1))
    spans = [(at, min(at + block, tokens)) for at in range(prompt, tokens, block)]
    return masks.block_diffusion(tokens, block, prompt), _spans(spans, tokens), tokens


def _spans(spans, tokens) -> Predicate:
    first = np.arange(max(tokens, 1))
    for start, end in spans:
        first[start:end] = start
    return lambda i, j, h: i >= first[j]


def _tree(tokens, heads, rng):
    prefix, nodes = max(tokens - 20, 0), int(rng.integers(1, 21))
    parents = [int(rng.integers(-1, at)) if at else -1 for at in range(nodes)]
    sight = np.zeros((nodes, nodes), bool)
    for at, parent in enumerate(parents):
        if parent >= 0:
            sight[at] = sight[parent]
        sight[at, at] = True

    def sees(i, j, h):
        row = np.clip(i - prefix, 0, nodes - 1)
        column = np.clip(j - prefix, 0, nodes - 1)
        node = (j < prefix) | ((j < prefix + nodes) & sight[row, column])
        return np.where(i < prefix, j <= i, np.where(j < prefix + nodes, node, j <= i))

    return masks.tree_verification(prefix, parents), sees, None


def _columns(tokens, heads, rng):
    causal = bool(rng.random() < 0.5)
    vectors = int(rng.choice([1, 2] if causal else [2, 4]))
    own = heads if rng.random() < 0.5 else 1
    given = np.sort(rng.integers(0, tokens + 1, (own, tokens, vectors)), -1)
    if vectors == 2 and not causal:
        given = given[..., ::-1]
    if vectors == 4:
        given = given[..., [2, 3, 0, 1]]
    open_end = True
    if rng.random() < 0.5:
        open_end = bool(rng.random() < 0.5)
        given = _wild(given, tokens, open_end, causal, rng)
    given = np.ascontiguousarray(given)
    # A bound equal to the number of keys is without end.
    bound = np.where((given == tokens) & open_end, masks.END, given)

    def sees(i, j, h):
        mine = bound[h if own > 1 else 0][j[0]]
        vector = [mine[None, :, at] for at in range(vectors)]
        if causal:
            lts, lte = (vector[0], masks.END) if vectors == 1 else vector
            return (i >= j) & ~((i >= lts) & (i < lte))
        lts, lte, uts, ute = (vector[0], masks.END, 0, vector[1]) if vectors == 2 else vector
        return ~((i >= lts) & (i < lte)) & ~((i >= uts) & (i < ute))

    mask = masks.ColumnIntervals(torch.from_numpy(given)[None], causal, open_end)
    return mask, sees, tokens


def _wild(given, tokens: int, open_end: bool, causal: bool, rng):
    """Bounds in any order, of hidden intervals that overlap, are empty or show nothing at all, at
    the ends of what is described and beyond."""
    ends = [0, 0, 1, tokens - 1, tokens, tokens]
    if not open_end:
        ends += [tokens + 1, tokens + 40, masks.END - 1, masks.END]
    extreme = rng.random(given.shape) < rng.choice([0.05, 0.5, 1.0])
    drawn = np.where(extreme, rng.choice(ends, given.shape), rng.permuted(given, axis=-1))
    if given.shape[-1] == 4:
        return np.concatenate([np.sort(drawn[..., :2], -1), np.sort(drawn[..., 2:], -1)], -1)
    return np.sort(drawn, -1) if causal else drawn


def _rows(tokens, heads, rng):
    first, queries = int(rng.integers(0, tokens)), int(rng.integers(1, tokens + 1))
    own = heads if rng.random() < 0.5 else 1
    # Ranges may reach past the described queries.
    edges = np.sort(rng.integers(0, first + queries + 20, (own, queries, 4)), -1)
    given = edges.reshape(own, queries, 2, 2)
    end = first + queries

    def sees(i, j, h):
        row = np.clip(i[:, 0] - first, 0, queries - 1)
        ranges = given[h if own > 1 else 0][row]
        told = (j[..., None] >= ranges[:, None, :, 0]) & (j[..., None] < ranges[:, None, :, 1])
        told = told.any(-1)
        past = np.where(j < end, told, j <= i)
        return np.where(i < first, j <= i, np.where(i >= end, past, told))

    return masks.RowIntervals(torch.from_numpy(given)[None], (first,)), sees, None


_DRAWN = {
    "causal": _causal,
    "full": _full,
    "sliding_window": _sliding_window,
    "causal_document": _causal_document,
    "document": _document,
    "shared_question": _shared_question,
    "global_sliding_window": _global_sliding_window,
    "causal_blockwise": _causal_blockwise,
    "prefix_lm": _prefix_lm,
    "prefix_lm_document": _prefix_lm_document,
    "qk_sparse": _qk_sparse,
    "random_eviction": _random_eviction,
    "image_spans": _image_spans,
    "block_diffusion": _block_diffusion,
    "tree": _tree,
    "columns": _columns,
    "rows": _rows,
}
INTERVAL_KINDS = tuple(_DRAWN)
