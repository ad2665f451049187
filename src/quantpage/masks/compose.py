"""``a & b``: what both masks show, where one of the forms can say it.

Columns hide rows, so that an intersection is a union of hidden intervals a key: it can be said
when it comes to two intervals or fewer. Rows show ranges, whose intersection is always ranges.
A column mask and a row mask meet in neither form.
"""

import torch
from torch import Tensor

from quantpage.masks.base import CausalMask, FullMask, Mask
from quantpage.masks.checks import END
from quantpage.masks.columns import ColumnIntervals
from quantpage.masks.rows import RowIntervals


def intersect(left: Mask, right: Mask) -> Mask:
    """The mask that shows what both show; ValueError says why there is none."""
    if isinstance(left, FullMask):
        return right
    if isinstance(right, FullMask):
        return left
    if isinstance(left, CausalMask) and isinstance(right, CausalMask):
        return _causal(left, right)
    if isinstance(right, CausalMask):
        left, right = right, left
    if isinstance(right, ColumnIntervals):
        if isinstance(left, CausalMask):
            left = _causal_columns(left, right)
        if isinstance(left, ColumnIntervals):
            return _columns(left, right)
    if isinstance(right, RowIntervals):
        if isinstance(left, CausalMask):
            left = _causal_rows(left, right)
        if isinstance(left, RowIntervals):
            return _rows(left, right)
    raise ValueError(
        f"mask: expected two masks of one form (columns & columns, rows & rows, or either & "
        f"causal), got {type(left).__name__} & {type(right).__name__}"
    )


def _causal(left: CausalMask, right: CausalMask) -> CausalMask:
    if left.window is None or right.window is None:
        return left if right.window is None else right
    if left.sink_tokens != right.sink_tokens:
        raise ValueError(
            "mask: expected windows with the same sink_tokens, got "
            f"{left.sink_tokens} & {right.sink_tokens}"
        )
    return CausalMask(min(left.window, right.window), left.sink_tokens)


def _causal_columns(causal: CausalMask, like: ColumnIntervals) -> ColumnIntervals:
    keys = torch.arange(like.bounds.shape[-1], device=like.bounds.device)
    after = torch.full_like(keys, END)
    if causal.window is not None:
        after = torch.where(keys < causal.sink_tokens, after, keys + causal.window)
    shape = (like.bounds.shape[0], 1, len(keys), 1)
    vector = after.view(1, 1, -1, 1).expand(shape)
    return ColumnIntervals(vector, open_end=False, lengths=like.lengths)


def _columns(left: ColumnIntervals, right: ColumnIntervals) -> ColumnIntervals:
    batch, heads, width = _common(left.bounds.shape, right.bounds.shape, (0, 1, 3))
    if _lengths(left.lengths, batch) != _lengths(right.lengths, batch):
        raise ValueError(
            f"mask: expected masks of the same keys, got lengths {left.lengths} & {right.lengths}"
        )
    keys = torch.arange(width, device=left.bounds.device)
    causal = left.causal and right.causal
    merged = torch.empty(batch, heads, width, 4, dtype=torch.int64, device=keys.device)
    for row in range(batch):
        for head in range(heads):
            parts = [*left.hidden_rows(keys, row, head), *right.hidden_rows(keys, row, head)]
            merged[row, head] = _union(parts, row, head)
    if causal and not bool(((merged[..., 0] < END) & (merged[..., 3] > keys)).any()):
        # Rows before the key are one of the two intervals; the other is the lower one.
        return ColumnIntervals(_lower(merged, keys), open_end=False, lengths=left.lengths)
    return ColumnIntervals(merged, False, open_end=False, lengths=left.lengths)


def _union(parts: list[Tensor], row: int, head: int) -> Tensor:
    """Four intervals a key, [n] tensors start, end, start, end, ..; at most two, [n, 4]."""
    starts, ends = torch.stack(parts[::2], -1), torch.stack(parts[1::2], -1)
    empty = starts >= ends
    starts, ends = starts.masked_fill(empty, END), ends.masked_fill(empty, 0)
    starts, order = starts.sort(-1)
    reach = ends.gather(-1, order).cummax(-1).values
    # A new interval begins where a start lies past everything before it.
    fresh = torch.ones_like(starts, dtype=torch.bool)
    fresh[:, 1:] = starts[:, 1:] > reach[:, :-1]
    fresh &= starts < END
    count = fresh.sum(-1)
    if bool((count > 2).any()):
        key = int((count > 2).nonzero()[0])
        raise ValueError(
            f"mask[{row}, {head}, {key}]: expected at most 2 hidden intervals of rows a key, "
            f"as columns hold, got {int(count[key])}"
        )
    rank = fresh.cumsum(-1)
    found = []
    for index in (2, 1):
        own = rank == index
        start = torch.where(own & fresh, starts, END).amin(-1)
        end = torch.where(own & (starts < END), reach, 0).amax(-1)
        found += [start, torch.where(start < END, end, 0)]
    return torch.stack(found, -1)


def _lower(merged: Tensor, keys: Tensor) -> Tensor:
    """[.., 4] with [0, key) in one interval -> LTS, LTE of what lies at or after the key."""
    high_start, high_end, low_start, low_end = merged.unbind(-1)
    # Key 0 has no row before it: its only interval, if any, is the first.
    one = high_start == END
    past = torch.where(one, low_end, high_end)
    start = torch.where(one, torch.maximum(low_start, keys), high_start)
    start = torch.where(start >= past, END, start)
    return torch.stack([start, torch.where(start == END, 0, past)], -1)


def _causal_rows(causal: CausalMask, like: RowIntervals) -> RowIntervals:
    batch, _, queries = like.intervals.shape[:3]
    assert like.first is not None
    first = torch.tensor(like.first).view(-1, 1)
    last = first + torch.arange(queries)
    start = torch.zeros_like(last)
    if causal.window is not None:
        start = (last - causal.window + 1).clamp(min=0)
    sink = start.clamp(max=causal.sink_tokens)
    pairs = torch.stack([torch.zeros_like(sink), sink, start, last + 1], -1)
    intervals = pairs.view(batch, 1, queries, 2, 2).to(like.intervals.device)
    return RowIntervals(intervals, like.first, like.lengths)


def _rows(left: RowIntervals, right: RowIntervals) -> RowIntervals:
    a, b = left.intervals, right.intervals
    batch, _, _ = _common(a.shape, b.shape, (0, 1, 2))
    spans = [(_lengths(each.first, batch), _lengths(each.lengths, batch)) for each in (left, right)]
    if spans[0] != spans[1]:
        raise ValueError(
            "mask: expected masks of the same queries, got (first, lengths) "
            f"{spans[0]} & {spans[1]}"
        )
    starts = torch.maximum(a[..., :, None, 0], b[..., None, :, 0]).flatten(-2)
    ends = torch.minimum(a[..., :, None, 1], b[..., None, :, 1]).flatten(-2)
    ends = torch.maximum(starts, ends)
    empty = starts == ends
    order = starts.masked_fill(empty, END).argsort(-1)
    pairs = torch.stack([starts.masked_fill(empty, 0), ends.masked_fill(empty, 0)], -1)
    pairs = pairs.gather(-2, order[..., None].expand_as(pairs))
    used = max(1, int((~empty).sum(-1).max()) if empty.numel() else 1)
    return RowIntervals(pairs[..., :used, :], *spans[0])


def _common(left: torch.Size, right: torch.Size, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of ``dims`` where they agree or one is 1 (batch and heads)."""
    sizes = []
    for dim in dims:
        a, b = left[dim], right[dim]
        if a != b and (dim > 1 or 1 not in (a, b)):
            raise ValueError(
                f"mask: expected shapes that agree, got {tuple(left)} & {tuple(right)}"
            )
        sizes.append(max(a, b))
    return tuple(sizes)


def _lengths(given: tuple[int, ...] | None, batch: int) -> tuple[int, ...]:
    assert given is not None
    return given * batch if len(given) == 1 else given
