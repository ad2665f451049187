"""Masks told a key at a time: which rows (queries) may not see key j.

FlashMask's form (arXiv 2410.01359). Key j is hidden from the queries at positions [LTS_j, LTE_j)
and [UTS_j, UTE_j); with ``causal`` also from every query before it. Four integers a key say what a
dense mask says with a bit a pair: 128k keys take 0.5 to 2 MiB.

    vectors   causal                  bidirectional
    1         LTS                     -
    2         LTS, LTE                LTS, UTE
    4         -                       LTS, LTE, UTS, UTE

A vector that is not given is the loosest one: LTE without end, UTS 0, and under ``causal`` UTE = j.

Positions are absolute, so that the mask means the same for a whole prompt, for its chunks and
after a prefix hit. **Past the described keys** (generation): a bound equal to the number of
described keys means "without end" (``open_end``), and a key that the mask does not describe is
seen by itself and by every query after it. A causal document mask therefore goes on writing its
last document.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

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

NAMES = {
    (1, True): ("LTS",),
    (2, True): ("LTS", "LTE"),
    (2, False): ("LTS", "UTE"),
    (4, False): ("LTS", "LTE", "UTS", "UTE"),
}
"""What each vector of the last dimension is, by (vectors, causal)."""


class HiddenRows(NamedTuple):
    """The queries that may not see a key: [lts, lte) and [uts, ute), a value a key."""

    lts: Int[Tensor, " keys"]
    lte: Int[Tensor, " keys"]
    uts: Int[Tensor, " keys"]
    ute: Int[Tensor, " keys"]


@dataclass(frozen=True, slots=True, eq=False)
class ColumnIntervals(IntervalMask):
    """FlashMask's ``startend_row_indices``; see the module."""

    startend_row_indices: Int[Tensor, "batch heads keys vectors"]
    """batch 1 serves every request, heads 1 every kv_head. Kept as a view of ``bounds``: ends are
    ``END`` and an interval without rows is [END, 0)."""
    causal: bool = True
    open_end: bool = True
    """A bound equal to the number of keys means without end; False: bounds are positions, and END
    alone is without end (a window that slides past the described keys)."""
    lengths: tuple[int, ...] | None = None
    """Described keys a batch row, where rows are padded; None: all."""
    bounds: Int[Tensor, "batch heads vectors keys"] = field(init=False, repr=False)
    """int32, one contiguous vector a bound: what kernels read."""

    def __post_init__(self) -> None:
        given = self.startend_row_indices
        names = self._check(given)
        batch, _, keys, _ = given.shape
        lengths = check_lengths(self.lengths, batch, keys)
        bounds = (
            given.to(torch.int32).transpose(-1, -2).clone(memory_format=torch.contiguous_format)
        )
        if self.open_end:
            limit = torch.tensor(lengths, dtype=torch.int32, device=given.device)
            bounds = bounds.masked_fill_(bounds == limit.view(-1, 1, 1, 1), END)
        if len(names) == 4 or names == ("LTS", "LTE"):
            for start in range(0, len(names), 2):
                empty = bounds[:, :, start] >= bounds[:, :, start + 1]
                bounds[:, :, start].masked_fill_(empty, END)
                bounds[:, :, start + 1].masked_fill_(empty, 0)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "bounds", bounds)
        object.__setattr__(self, "startend_row_indices", bounds.transpose(-1, -2))

    @property
    def _told(self) -> Tensor:
        """As IntervalMask."""
        return self.bounds

    def described(self, request: int = 0) -> int:
        """Keys that the mask describes; later ones are causal."""
        assert self.lengths is not None
        return self.lengths[pick(request, len(self.lengths), "request")]

    def hidden_rows(
        self, keys: Int[Tensor, " keys"], request: int = 0, kv_head: int = 0
    ) -> HiddenRows:
        """The rows that may not see the keys at positions ``keys``, described or not."""
        batch, heads, vectors, width = self.bounds.shape
        own = self.bounds[pick(request, batch, "request"), pick(kv_head, heads, "kv_head")]
        own = own.to(keys.device)
        named = {
            name: own[index][keys.clamp(max=max(width - 1, 0))].long()
            for index, name in enumerate(NAMES[vectors, self.causal])
            if width
        }
        past = keys >= self.described(request)
        end = torch.full_like(keys, END, dtype=torch.int64)
        zero, causal = torch.zeros_like(end), keys.long()
        lts = torch.where(past, end, named.get("LTS", end))
        lte = torch.where(past, zero, named.get("LTE", end))
        uts = torch.where(past, zero, named.get("UTS", zero))
        ute = torch.where(past, causal, named.get("UTE", causal))
        return HiddenRows(lts, lte, uts, ute)

    def visible(self, queries: Queries, keys: Keys, request: int = 0, kv_head: int = 0) -> Seen:
        """Neither in the lower nor in the upper interval of the key."""
        hidden, q = self.hidden_rows(keys, request, kv_head), queries[:, None]
        lower = (q >= hidden.lts) & (q < hidden.lte)
        upper = (q >= hidden.uts) & (q < hidden.ute)
        return ~(lower | upper)

    def key_range(
        self, first_query: int, last_query: int, keys: int, request: int = 0
    ) -> tuple[int, int]:
        """From the first to the last key that one interval does not hide from all the queries."""
        positions = torch.arange(keys, device=self.bounds.device)
        seen = torch.zeros(keys, dtype=torch.bool, device=positions.device)
        for head in range(self.bounds.shape[1]):
            hidden = self.hidden_rows(positions, request, head)
            lower = (first_query >= hidden.lts) & (last_query < hidden.lte)
            upper = (first_query >= hidden.uts) & (last_query < hidden.ute)
            seen |= ~(lower | upper)
        found = seen.nonzero()
        return (0, 0) if not len(found) else (int(found[0]), int(found[-1]) + 1)

    def cuts(self, length: int, request: int = 0) -> Bool[Tensor, " length_plus_1"]:
        """As Mask: a cut p is good where every key from p on has its first viewer at p or later."""
        keys = torch.arange(length, device=self.bounds.device)
        good = torch.ones(length + 1, dtype=torch.bool, device=keys.device)
        for head in range(self.heads if length else 0):
            viewer = self._first_viewer(keys, request, head)
            earliest = viewer.flip(0).cummin(0).values.flip(0)
            good[:length] &= earliest >= keys
        return good

    def intersect(self, other: Mask) -> "ColumnIntervals | None":
        """Another column mask, or a causal one said in columns: hidden intervals are joined.

        ValueError for a key with more than two of them.
        """
        if isinstance(other, CausalMask):
            other = _of_causal(other, self)
        return _joined(self, other) if isinstance(other, ColumnIntervals) else None

    def to(self, device: torch.device | str) -> "ColumnIntervals":
        """The same mask on ``device``."""
        if self.bounds.device == torch.device(device):
            return self
        moved = self.bounds.transpose(-1, -2).to(device)
        return ColumnIntervals(moved, self.causal, open_end=False, lengths=self.lengths)

    def _first_viewer(self, keys: Tensor, request: int, head: int) -> Tensor:
        """Smallest query that sees each key."""
        hidden = self.hidden_rows(keys, request, head)
        row = torch.zeros_like(hidden.lts)
        # Two intervals: at most two steps, in either order.
        for start, end in ((0, 1), (2, 3), (0, 1)):
            row = torch.where((row >= hidden[start]) & (row < hidden[end]), hidden[end], row)
        return row

    def _check(self, given: Tensor) -> tuple[str, ...]:
        name = "startend_row_indices"
        if given.ndim != 4:
            raise ValueError(
                f"{name}: expected rank 4, [batch, kv_heads or 1, keys, 1 | 2 | 4], "
                f"got shape {tuple(given.shape)}"
            )
        if given.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {given.dtype}")
        found = NAMES.get((given.shape[-1], self.causal))
        if found is None:
            wanted = "1 or 2 (causal)" if self.causal else "2 or 4 (bidirectional)"
            raise ValueError(f"{name}: expected {wanted} vectors a key, got {given.shape[-1]}")
        limit = given.shape[2] if self.open_end else END
        bad = first_bad((given < 0) | (given > limit))
        if bad is not None:
            raise ValueError(
                f"{row_name(name, bad)}: expected a row in 0..{limit}, got {int(given[bad])}"
            )
        for start, end in (("LTS", "LTE"), ("UTS", "UTE")):
            if start not in found or end not in found:
                continue
            low, high = given[..., found.index(start)], given[..., found.index(end)]
            # [END, 0) is how an empty interval is kept: a mask may be built from another's.
            bad = first_bad((low > high) & ~((low == END) & (high == 0)))
            if bad is not None:
                raise ValueError(
                    f"{row_name(name, bad)}: expected {start} <= {end}, "
                    f"got {int(low[bad])} > {int(high[bad])}"
                )
        return found


def _of_causal(causal: CausalMask, like: ColumnIntervals) -> ColumnIntervals:
    """A causal mask over the keys that ``like`` describes."""
    keys = torch.arange(like.bounds.shape[-1], device=like.bounds.device)
    after = torch.full_like(keys, END)
    if causal.window is not None:
        after = torch.where(keys < causal.sink_tokens, after, keys + causal.window)
    shape = (like.bounds.shape[0], 1, len(keys), 1)
    vector = after.view(1, 1, -1, 1).expand(shape)
    return ColumnIntervals(vector, open_end=False, lengths=like.lengths)


def _joined(left: ColumnIntervals, right: ColumnIntervals) -> ColumnIntervals:
    batch, heads, width = common_sizes(left.bounds.shape, right.bounds.shape, (0, 1, 3))
    if widened(left.lengths, batch) != widened(right.lengths, batch):
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
