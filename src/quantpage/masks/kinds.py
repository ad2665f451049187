"""The masks that people use, as column intervals: a function a kind.

The first twelve are the kinds that FlashMask was measured on (arXiv 2410.01359, figure 1). Each
describes one request (batch 1, all heads); docs/masks.md shows a picture of each.

    causal             full                   sliding_window       causal_document
    document           shared_question        global_sliding_window
    causal_blockwise   prefix_lm              prefix_lm_document
    qk_sparse          random_eviction
    image_spans        block_diffusion        tree_verification

New tokens past the described ones are causal (masks/columns).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from quantpage.cache.counts import whole
from quantpage.masks.checks import END
from quantpage.masks.columns import ColumnIntervals
from quantpage.masks.tree import TreeMask


def causal(tokens: int) -> ColumnIntervals:
    """Query i sees keys 0 .. i."""
    whole("tokens", tokens)
    return _columns(torch.full((tokens,), END, device="cpu"))


def full(tokens: int) -> ColumnIntervals:
    """Every described token sees every other."""
    whole("tokens", tokens)
    return _columns(
        torch.full((tokens,), END, device="cpu"), torch.zeros(tokens, device="cpu"), causal=False
    )


def sliding_window(tokens: int, window: int) -> ColumnIntervals:
    """Query i sees the last ``window`` keys, its own included.

    Describe as many tokens as the request may reach, so that the window goes on sliding.
    """
    whole("tokens", tokens)
    whole("window", window, 1)
    return _columns(torch.arange(tokens, device="cpu") + window)


def causal_document(lengths: Sequence[int]) -> ColumnIntervals:
    """Documents packed in a row, each causal, none seeing another."""
    starts, ends = _documents("lengths", lengths)
    return _columns(_open(ends, starts, lengths))


def document(lengths: Sequence[int]) -> ColumnIntervals:
    """Documents packed in a row, each bidirectional, none seeing another."""
    starts, ends = _documents("lengths", lengths)
    return _columns(_open(ends, starts, lengths), starts, causal=False)


def shared_question(question: int, answers: Sequence[int]) -> ColumnIntervals:
    """One question and several answers: an answer sees the question and itself, causally."""
    whole("question", question, 0)
    starts, ends = _documents("answers", answers)
    after = _open(ends + question, starts + question, answers)
    return _columns(torch.cat([torch.full((question,), END, device="cpu"), after]))


def global_sliding_window(tokens: int, global_tokens: int, window: int) -> ColumnIntervals:
    """The first tokens see all and are seen by all; others see ``window`` keys to each side."""
    whole("tokens", tokens)
    _within("global_tokens", global_tokens, 0, tokens)
    whole("window", window, 0)
    keys = torch.arange(tokens, device="cpu")
    wide = keys < global_tokens
    lts = torch.where(wide, END, (keys + window + 1).clamp(min=global_tokens))
    uts = torch.where(wide, 0, global_tokens)
    ute = torch.where(wide, 0, (keys - window).clamp(min=global_tokens))
    return _columns(lts, torch.full((tokens,), END, device="cpu"), uts, ute, causal=False)


def causal_blockwise(lengths: Sequence[int]) -> ColumnIntervals:
    """Demonstrations that see themselves only, and a last part that sees all of them."""
    starts, ends = _documents("lengths", lengths)
    last = sum(lengths) - lengths[-1]
    lts = torch.where(starts == last, END, ends)
    lte = torch.where(starts == last, END, last)
    return _columns(lts, lte)


def prefix_lm(tokens: int, prefix: int) -> ColumnIntervals:
    """The first ``prefix`` tokens are seen by all of themselves; the rest is causal."""
    whole("tokens", tokens)
    _within("prefix", prefix, 0, tokens)
    keys = torch.arange(tokens, device="cpu")
    return _columns(
        torch.full((tokens,), END, device="cpu"), torch.where(keys < prefix, 0, keys), causal=False
    )


def prefix_lm_document(documents: Sequence[tuple[int, int]]) -> ColumnIntervals:
    """Packed prefix-LM documents, each (prefix, length); none sees another."""
    lengths = [length for _, length in documents]
    for row, (prefix, length) in enumerate(documents):
        _within(f"documents[{row}] prefix", prefix, 0, length)
    starts, ends = _documents("documents", lengths)
    keys = torch.arange(len(starts), device="cpu")
    prefixes = torch.repeat_interleave(
        torch.tensor([prefix for prefix, _ in documents], device="cpu"),
        torch.tensor(lengths, device="cpu"),
    )
    ute = torch.where(keys < starts + prefixes, starts, keys)
    return _columns(_open(ends, starts, lengths), ute, causal=False)


def qk_sparse(tokens: int, gaps: Sequence[tuple[int, int]]) -> ColumnIntervals:
    """Causal, with queries dropped: those of a gap (first, length) do not see the keys between
    the gap before and their own.
    """
    whole("tokens", tokens)
    lts, lte = torch.full((tokens,), END, device="cpu"), torch.full((tokens,), END, device="cpu")
    before = 0
    for row, (first, length) in enumerate(gaps):
        _within(f"gaps[{row}] first", first, before, tokens)
        _within(f"gaps[{row}] length", length, 0, tokens - first)
        lts[before:first], lte[before:first] = first, first + length
        before = first
    return _columns(lts, lte)


def random_eviction(evicted_at: Int[Tensor, " tokens"]) -> ColumnIntervals:
    """Causal; key j is gone from query ``evicted_at[j]`` on (END: kept).

    Raises ValueError for another shape or dtype, and for a key that would be gone before it came.
    """
    if evicted_at.ndim != 1 or evicted_at.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"evicted_at: expected [tokens] of int32 or int64, got {tuple(evicted_at.shape)} of "
            f"{evicted_at.dtype}"
        )
    early = (evicted_at <= torch.arange(len(evicted_at), device=evicted_at.device)).nonzero()
    if len(early):
        key = int(early[0])
        raise ValueError(
            f"evicted_at[{key}]: expected a query after {key}, got {int(evicted_at[key])}"
        )
    return _columns(evicted_at)


def image_spans(tokens: int, spans: Sequence[tuple[int, int]]) -> ColumnIntervals:
    """Causal text with images: tokens of a span [start, end) see all of their own span."""
    whole("tokens", tokens)
    ute = torch.arange(tokens, device="cpu")
    before = 0
    for row, (start, end) in enumerate(spans):
        _within(f"spans[{row}] start", start, before, tokens)
        _within(f"spans[{row}] end", end, start, tokens)
        ute[start:end] = start
        before = end
    return _columns(torch.full((tokens,), END, device="cpu"), ute, causal=False)


def block_diffusion(tokens: int, block: int, prompt: int = 0) -> ColumnIntervals:
    """A causal prompt, then spans of ``block`` tokens that see themselves and all before them."""
    whole("tokens", tokens)
    whole("block", block, 1)
    _within("prompt", prompt, 0, tokens)
    return image_spans(
        tokens, [(at, min(at + block, tokens)) for at in range(prompt, tokens, block)]
    )


def tree_verification(prefix: int, parents: Sequence[int]) -> TreeMask:
    """Drafted tokens after ``prefix`` ones: node i sees the prompt, its ancestors and itself."""
    return TreeMask.from_parents(prefix, parents)


def _columns(*vectors: Tensor, causal: bool = True) -> ColumnIntervals:
    stacked = torch.stack([each.to(torch.int64) for each in vectors], -1)
    return ColumnIntervals(stacked[None, None], causal, open_end=False)


def _documents(name: str, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First token and end of the document that each token is in."""
    if not len(lengths):
        raise ValueError(f"{name}: expected at least one document, got none")
    each = [whole(f"{name}[{row}]", length, 1) for row, length in enumerate(lengths)]
    ends, counts = (
        torch.tensor(list(accumulate(each)), device="cpu"),
        torch.tensor(each, device="cpu"),
    )
    return (ends - counts).repeat_interleave(counts), ends.repeat_interleave(counts)


def _open(ends: Tensor, starts: Tensor, lengths: Sequence[int]) -> Tensor:
    """Ends, without end for the last document: generation goes on in it."""
    return torch.where(starts == starts[-1], END, ends)


def _within(name: str, value: int, low: int, high: int) -> None:
    if not (isinstance(value, SupportsIndex) and low <= value.__index__() <= high):
        raise ValueError(f"{name}: expected {low}..{high}, got {value!r}")
