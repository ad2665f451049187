"""Masks told a query at a time: the key ranges that query i sees.

FastDeploy's ``attn_mask_offsets`` is the form with one range [start, end) a query; here both ends
are honoured and a query may have several ranges. Rows describe the queries at positions
``first .. first + queries - 1`` of a request, so that a mask of a few draft tokens after a long
prompt is small.

A query before ``first`` sees causally. **Past the described queries** (generation) a query sees
what the last described one saw among the keys before it, and every key from there on to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from quantpage.masks.base import CausalMask, IntervalMask, Keys, Mask, Queries, Seen
from quantpage.masks.checks import (
    END,
    check_lengths,
    common_sizes,
    first_bad,
    pick,
    row_name,
    widened,
)


@dataclass(frozen=True, slots=True, eq=False)
class RowIntervals(IntervalMask):
    """Visible key ranges a query; see the module.

    Raises ValueError for ranges, lengths and first positions that cannot be.
    """

    intervals: Int[Tensor, "batch heads queries ranges 2"]
    """[start, end) in absolute key positions, sorted and disjoint in a query; empty ranges
    (start == end) may stand anywhere. batch 1 serves every request, heads 1 every kv_head."""
    first: tuple[int, ...] | None = None
    """Position of the first described query, a batch row; None: 0."""
    lengths: tuple[int, ...] | None = None
    """Described queries a batch row, where rows are padded; None: all."""

    def __post_init__(self) -> None:
        given = self.intervals
        self._check(given)
        batch, _, queries = given.shape[:3]
        first = (0,) * batch if self.first is None else tuple(self.first)
        if len(first) != batch or min(first, default=0) < 0:
            raise ValueError(
                f"first: expected {batch} positions of at least 0, one a batch row, got {first}"
            )
        object.__setattr__(self, "intervals", given.to(torch.int32).contiguous())
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "lengths", check_lengths(self.lengths, batch, queries))

    @classmethod
    def from_offsets(
        cls,
        offsets: Int[Tensor, " two_tokens"],
        query_starts: Sequence[int],
        context_lens: Sequence[int],
    ) -> "RowIntervals":
        """FastDeploy's ``attn_mask_offsets``: (start, end) of each new token of a ragged batch.

        query_starts: [0, .., tokens]; context_lens: cached + new tokens of each request. Raises
        ValueError for another number of offsets or requests.
        """
        tokens = query_starts[-1]
        if offsets.numel() != 2 * tokens:
            raise ValueError(
                f"offsets: expected {2 * tokens} integers, 2 a new token, got {offsets.numel()}"
            )
        lens = [end - start for start, end in pairwise(query_starts)]
        rows = offsets.reshape(-1, 2).split(lens)
        padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        first = tuple(c - n for c, n in zip(context_lens, lens, strict=True))
        return cls(padded[:, None, :, None], first=first, lengths=tuple(lens))

    @property
    def _told(self) -> Tensor:
        """As IntervalMask."""
        return self.intervals

    def described(self, request: int = 0) -> int:
        """As Mask: up to the last described query."""
        return self.span(request)[1]

    def span(self, request: int = 0) -> tuple[int, int]:
        """Positions of the first described query and after the last."""
        assert self.first is not None and self.lengths is not None
        row = pick(request, len(self.lengths), "request")
        return self.first[row], self.first[row] + self.lengths[row]

    def visible_ranges(
        self, queries: Queries, request: int = 0, kv_head: int = 0
    ) -> Int[Tensor, "queries ranges 2"]:
        """The ranges of queries at any positions, described or not; the last is for new tokens."""
        batch, heads, _, ranges, _ = self.intervals.shape
        own = self.intervals[pick(request, batch, "request"), pick(kv_head, heads, "kv_head")]
        start, end = self.span(request)
        found = torch.zeros(len(queries), ranges + 1, 2, dtype=torch.int64, device=queries.device)
        if end > start:
            index = (queries - start).clamp(0, end - start - 1)
            found[:, :ranges] = own.to(queries.device)[index]
        before = (queries < start) | (end == start)
        past = (queries >= end) & ~before
        found[:, :ranges].masked_fill_(before[:, None, None], 0)
        # In the first range, as the described rows usually begin there too: tiles stay full.
        found[:, 0, 1] = torch.where(before, queries + 1, found[:, 0, 1])
        clipped = found[:, :ranges].clamp(max=end)
        found[:, :ranges] = torch.where(past[:, None, None], clipped, found[:, :ranges])
        found[:, ranges, 0] = torch.where(past, end, 0)
        found[:, ranges, 1] = torch.where(past, queries + 1, 0)
        return found

    def visible(self, queries: Queries, keys: Keys, request: int = 0, kv_head: int = 0) -> Seen:
        """In one of the query's ranges."""
        ranges = self.visible_ranges(queries, request, kv_head)
        starts, ends = ranges[..., 0, None], ranges[..., 1, None]
        return ((keys >= starts) & (keys < ends)).any(1)

    def key_range(
        self, first_query: int, last_query: int, keys: int, request: int = 0
    ) -> tuple[int, int]:
        """From the lowest start to the highest end."""
        queries = torch.arange(first_query, last_query + 1, device=self.intervals.device)
        low, high = keys, 0
        for head in range(self.intervals.shape[1]):
            ranges = self.visible_ranges(queries, request, head).flatten(0, 1)
            ranges = ranges[ranges[:, 0] < ranges[:, 1]]
            if len(ranges):
                low = min(low, int(ranges[:, 0].min()))
                high = max(high, min(int(ranges[:, 1].max()), keys))
        return (low, high) if low < high else (0, 0)

    def cuts(self, length: int, request: int = 0) -> Bool[Tensor, " length_plus_1"]:
        """As Mask: a cut p is good where no query before p sees a key from p on."""
        queries = torch.arange(length, device=self.intervals.device)
        good = torch.ones(length + 1, dtype=torch.bool, device=queries.device)
        for head in range(self.heads if length else 0):
            # A range past the last key holds nothing.
            ranges = self.visible_ranges(queries, request, head).clamp(max=length)
            ends = torch.where(ranges[..., 0] < ranges[..., 1], ranges[..., 1], 0).amax(1)
            good[1:length] &= ends.cummax(0).values[: length - 1] <= queries[1:]
        return good

    def intersect(self, other: Mask) -> "RowIntervals | None":
        """Another row mask, or a causal one said in rows: ranges are intersected."""
        if isinstance(other, CausalMask):
            other = _of_causal(other, self)
        return _common_ranges(self, other) if isinstance(other, RowIntervals) else None

    def to(self, device: torch.device | str) -> "RowIntervals":
        """The same mask on ``device``."""
        if self.intervals.device == torch.device(device):
            return self
        return RowIntervals(self.intervals.to(device), self.first, self.lengths)

    def _check(self, given: Tensor) -> None:
        name = "intervals"
        if given.ndim != 5 or given.shape[-1] != 2 or given.shape[-2] < 1:
            raise ValueError(
                f"{name}: expected rank 5, [batch, kv_heads or 1, queries, ranges, 2], "
                f"got shape {tuple(given.shape)}"
            )
        if given.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {given.dtype}")
        bad = first_bad(given < 0)
        if bad is not None:
            raise ValueError(
                f"{row_name(name, bad)}: expected a key of at least 0, got {int(given[bad])}"
            )
        starts, ends = given[..., 0], given[..., 1]
        bad = first_bad(starts > ends)
        if bad is not None:
            raise ValueError(
                f"{row_name(name, bad)}: expected start <= end, "
                f"got [{int(starts[bad])}, {int(ends[bad])})"
            )
        # Each start against the highest end before it, empty ranges left out.
        real = starts < ends
        reach = torch.where(real, ends, 0).cummax(-1).values[..., :-1]
        bad = first_bad(real[..., 1:] & (starts[..., 1:] < reach))
        if bad is not None:
            at = (*bad[:-1], bad[-1] + 1)
            raise ValueError(
                f"{row_name(name, at)}: expected ranges sorted and disjoint, got a start of "
                f"{int(starts[at])} after an end of {int(reach[bad])}"
            )


def _of_causal(causal: CausalMask, like: RowIntervals) -> RowIntervals:
    """A causal mask over the queries that ``like`` describes."""
    batch, _, queries = like.intervals.shape[:3]
    assert like.first is not None
    first = torch.tensor(like.first, device="cpu").view(-1, 1)
    last = first + torch.arange(queries, device="cpu")
    start = torch.zeros_like(last)
    if causal.window is not None:
        start = (last - causal.window + 1).clamp(min=0)
    sink = start.clamp(max=causal.sink_tokens)
    pairs = torch.stack([torch.zeros_like(sink), sink, start, last + 1], -1)
    intervals = pairs.view(batch, 1, queries, 2, 2).to(like.intervals.device)
    return RowIntervals(intervals, like.first, like.lengths)


def _common_ranges(left: RowIntervals, right: RowIntervals) -> RowIntervals:
    a, b = left.intervals, right.intervals
    batch, _, _ = common_sizes(a.shape, b.shape, (0, 1, 2))
    spans = [(widened(each.first, batch), widened(each.lengths, batch)) for each in (left, right)]
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
