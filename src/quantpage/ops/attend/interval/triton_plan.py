"""The planner of interval masks on the GPU: two small launches a step, nothing read back.

The first keeps the smallest and largest bound of every key tile (column masks only); the second
judges every (query tile, key tile) pair, a vector of key tiles at a time, and packs the survivors
into lists by a prefix sum. interval/plan is the oracle and says what the lists mean.

Lists have the capacity of the longest context, so that a captured graph goes on serving as lengths
grow up to it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.masks import ColumnIntervals, RowIntervals
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS, EXACT_KEYS, near_page
from quantpage.ops.attend.interval.plan import MaskPlan, MaskTile, query_tiles
from quantpage.ops.attend.params import SEGMENTS, Segment
from quantpage.ops.triton.common import Constant

END = Constant(2**31 - 1)
LANES = 128
"""Key tiles judged at once."""


@triton.jit
def hidden_rows(bounds, width, length, keys, VECTORS: tl.constexpr, CAUSAL: tl.constexpr):
    """lts, lte, uts, ute of each key: the rows that may not see it (masks/columns)."""
    inside = keys < length
    lts = tl.load(bounds + keys, inside, END)
    lte = tl.where(inside, END, 0)
    uts = tl.zeros_like(keys)
    ute = keys
    if VECTORS == 4 or (VECTORS == 2 and CAUSAL):
        lte = tl.load(bounds + width + keys, inside, 0)
    if VECTORS == 4:
        uts = tl.load(bounds + 2 * width + keys, inside, 0)
    if not CAUSAL:
        own = tl.load(bounds + (VECTORS - 1) * width + keys, inside, 0)
        ute = tl.where(inside, own, keys)
    return lts, lte, uts, ute


@triton.jit
def visible_range(ranges, first, length, queries, slot, RANGES: tl.constexpr):
    """Range ``slot`` of each query; slot RANGES is what new tokens add (masks/rows)."""
    end_of_rows = first + length
    before = (queries < first) | (length == 0)
    past = (queries >= end_of_rows) & (length > 0)
    if slot < RANGES:
        index = tl.maximum(tl.minimum(queries - first, length - 1), 0)
        at = ranges + (index.to(tl.int64) * RANGES + slot) * 2
        start = tl.load(at, length > 0, 0)
        end = tl.load(at + 1, length > 0, 0)
        end = tl.where(past, tl.minimum(end, end_of_rows), end)
        start = tl.where(before, 0, start)
        end = tl.where(before, tl.where(slot == 0, queries + 1, 0), end)
    else:
        start = tl.where(past, end_of_rows, 0)
        end = tl.where(past, queries + 1, 0)
    return start, end


@triton.jit
def _key_bounds_kernel(
    bounds,
    spans,
    context_lens,
    key_bounds,
    width,
    m_batch,
    m_head,
    heads,
    capacity,
    BN: tl.constexpr,
    VECTORS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
):
    tile = tl.program_id(0)
    request = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    context = tl.load(context_lens + request)
    if tile * BN < context:
        span = spans + (0 if SHARED else request * 2)
        # The last key stands in for those after it, which leaves its tile's bounds alone.
        keys = tl.minimum(tile * BN + tl.arange(0, BN), context - 1)
        own = bounds + request.to(tl.int64) * m_batch + head.to(tl.int64) * m_head
        lts, lte, uts, ute = hidden_rows(own, width, tl.load(span + 1), keys, VECTORS, CAUSAL)
        at = key_bounds + tl.program_id(1).to(tl.int64) * 8 * capacity + tile
        tl.store(at, tl.min(lts, 0))
        tl.store(at + capacity, tl.max(lts, 0))
        tl.store(at + 2 * capacity, tl.min(lte, 0))
        tl.store(at + 3 * capacity, tl.max(lte, 0))
        tl.store(at + 4 * capacity, tl.min(uts, 0))
        tl.store(at + 5 * capacity, tl.max(uts, 0))
        tl.store(at + 6 * capacity, tl.min(ute, 0))
        tl.store(at + 7 * capacity, tl.max(ute, 0))


@triton.jit
def _plan_kernel(
    items,
    query_starts,
    context_lens,
    key_bounds,
    intervals,
    spans,
    tiles_out,
    counts_out,
    m_batch,
    m_head,
    capacity,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    RANGES: tl.constexpr,
    SHARED: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAGE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One (query tile, mask head) a program; ROWS: tokens of a query tile, a power of two."""
    item = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    request = tl.load(items + item * 2)
    row = tl.load(items + item * 2 + 1)
    context = tl.load(context_lens + request)
    new = tl.load(query_starts + request + 1) - tl.load(query_starts + request)
    first = context - new + row // G
    end = context - new + (tl.minimum(row + BM, new * G) - 1) // G + 1
    span = spans + (0 if SHARED else request * 2)
    described = tl.load(span)
    length = tl.load(span + 1)
    own = key_bounds + (request.to(tl.int64) * heads + head) * 8 * capacity
    ranges = intervals + request.to(tl.int64) * m_batch + head.to(tl.int64) * m_head
    out = tiles_out + (item.to(tl.int64) * heads + head) * capacity
    full_count = 0
    partial_count = 0
    for start in range(0, tl.cdiv(context, BN), LANES):
        tile = start + tl.arange(0, LANES)
        real = tile * BN < context
        low = tile * BN
        high = tl.minimum(low + BN, context)
        if RANGES == 0:
            at = own + tile
            lts_low, lts_high = tl.load(at, real, 0), tl.load(at + capacity, real, 0)
            lte_low = tl.load(at + 2 * capacity, real, 0)
            lte_high = tl.load(at + 3 * capacity, real, 0)
            uts_low = tl.load(at + 4 * capacity, real, 0)
            uts_high = tl.load(at + 5 * capacity, real, 0)
            ute_low = tl.load(at + 6 * capacity, real, 0)
            ute_high = tl.load(at + 7 * capacity, real, 0)
            hidden = ((first >= lts_high) & (end <= lte_low)) | (
                (first >= uts_high) & (end <= ute_low)
            )
            touched = ((end > lts_low) & (first < lte_high)) | (
                (end > uts_low) & (first < ute_high)
            )
            seen = real & ~hidden
            full = seen & ~touched
        else:
            queries = tl.minimum(first + tl.arange(0, ROWS), end - 1)
            full = tile < 0
            seen = tile < 0
            for slot in tl.static_range(RANGES + 1):
                starts, ends = visible_range(ranges, described, length, queries, slot, RANGES)
                empty = starts >= ends
                starts = tl.where(empty, END, starts)
                ends = tl.where(empty, 0, ends)
                full |= (low >= tl.max(starts, 0)) & (high <= tl.min(ends, 0))
                seen |= (high > tl.min(starts, 0)) & (low < tl.max(ends, 0))
            seen = (seen | full) & real
            full &= real
        if SEGMENT != ALL_KEYS:
            own_low = tl.maximum(near_page(first, PAGE), 0) * PAGE
            own_high = ((end - 1) // PAGE + 1) * PAGE
            near = (low < PAGE) | ((low < own_high) & (low + BN > own_low))
            if SEGMENT == EXACT_KEYS:
                seen &= near
                full &= tile < 0
            else:
                seen &= low + BN > PAGE
                full &= ~near & seen
        full &= low + BN <= context
        partial = seen & ~full
        place = full_count + tl.cumsum(full.to(tl.int32), 0) - 1
        tl.store(out + place, tile, full)
        place = capacity - partial_count - tl.cumsum(partial.to(tl.int32), 0)
        tl.store(out + place, tile, partial)
        full_count += tl.sum(full.to(tl.int32), 0)
        partial_count += tl.sum(partial.to(tl.int32), 0)
    at = counts_out + (item * heads + head) * 2
    tl.store(at, full_count)
    tl.store(at + 1, partial_count)


@triton.jit
def _order_kernel(counts, order, items, heads, TILE: tl.constexpr):
    """The rank of TILE items by their visits: how many have more, or as many and come before."""
    own = tl.program_id(0) * TILE + tl.arange(0, TILE)
    cost = tl.zeros([TILE], tl.int32)
    for at in range(2 * heads):
        cost += tl.load(counts + own * 2 * heads + at, own < items, 0)
    rank = tl.zeros([TILE], tl.int32)
    for start in range(0, items, TILE):
        other = start + tl.arange(0, TILE)
        theirs = tl.zeros([TILE], tl.int32)
        for at in range(2 * heads):
            theirs += tl.load(counts + other * 2 * heads + at, other < items, -1)
        first = (theirs[None, :] > cost[:, None]) | (
            (theirs[None, :] == cost[:, None]) & (other[None, :] < own[:, None])
        )
        rank += tl.sum(first.to(tl.int32), 1)
    tl.store(order + rank, own, own < items)


def visit_order(plan: MaskPlan) -> Tensor:
    """Query tiles by their visits over all mask heads, most first; int32, one launch."""
    items, heads, _ = plan.counts.shape
    order = torch.empty(items, dtype=torch.int32, device=plan.counts.device)
    if items:
        _order_kernel[(triton.cdiv(items, 64),)](
            plan.counts, order, items, heads, TILE=64, num_warps=4
        )
    return order


@lru_cache(maxsize=64)
def query_tiles_on(query_lens: tuple[int, ...], group: int, rows: int, device: str) -> Tensor:
    """``query_tiles`` on the device; every layer of a step shares them."""
    return query_tiles(query_lens, group, rows).to(device)


@lru_cache(maxsize=64)
def spans_on(first: tuple[int, ...], lengths: tuple[int, ...], device: str) -> Tensor:
    """Described positions of each batch row: [batch, 2] of the first and how many."""
    rows = list(zip(first, lengths, strict=True))
    return torch.tensor(rows, dtype=torch.int32, device="cpu").view(-1, 2).to(device)


class MaskArguments(NamedTuple):
    """What kernels are told of a lowered mask."""

    tensor: Tensor
    """Bounds of columns, or ranges of rows."""
    spans: Tensor
    """See ``spans_on``."""
    batch: int
    """Numbers from a request's mask to the next's; 0: one serves all."""
    head: int
    """The same from kv_head to kv_head."""
    heads: int
    width: int
    """Keys of each vector of bounds."""
    vectors: int
    """Of bounds; 0: rows."""
    ranges: int
    """Of a row; 0: columns."""
    causal: bool
    shared: bool
    """One serves all requests."""

    @property
    def compiled(self) -> dict[str, int | bool]:
        """What is compiled into an attention kernel."""
        return {
            "VECTORS": self.vectors,
            "CAUSAL": self.causal,
            "RANGES": self.ranges,
            "PER_HEAD": self.heads > 1,
            "SHARED": self.shared,
        }


def mask_arguments(form: ColumnIntervals | RowIntervals, device: torch.device) -> MaskArguments:
    """Of a mask that is on ``device``."""
    assert form.lengths is not None
    if isinstance(form, ColumnIntervals):
        tensor, first, causal = form.bounds, (0,) * len(form.lengths), form.causal
        width, vectors, ranges = tensor.shape[3], tensor.shape[2], 0
    else:
        assert form.first is not None
        tensor, first, causal = form.intervals, form.first, False
        width, vectors, ranges = 0, 0, tensor.shape[3]
    requests, heads = tensor.shape[:2]
    return MaskArguments(
        tensor=tensor,
        spans=spans_on(first, form.lengths, str(device)),
        batch=0 if requests == 1 else tensor.stride(0),
        head=0 if heads == 1 else tensor.stride(1),
        heads=heads,
        width=width,
        vectors=vectors,
        ranges=ranges,
        causal=causal,
        shared=requests == 1,
    )


def plan_tiles(
    mask: ColumnIntervals | RowIntervals,
    batch: BatchPlan,
    group: int,
    tile: MaskTile,
    segment: Segment = "all",
) -> MaskPlan:
    """As interval/plan.plan_tiles, from lowered masks on the batch's device."""
    device = batch.page_table.device
    given = mask_arguments(mask, device)
    heads = given.heads
    items = query_tiles_on(batch.query_lens, group, tile.rows, str(device))
    capacity = max(1, -(-batch.max_context_len // tile.keys))
    tiles = torch.empty(len(items), heads, capacity, dtype=torch.int32, device=device)
    counts = torch.empty(len(items), heads, 2, dtype=torch.int32, device=device)
    if not len(items):
        return MaskPlan(items, tiles, counts)
    key_bounds = counts
    if given.vectors:
        key_bounds = torch.empty(
            batch.num_requests * heads, 8, capacity, dtype=torch.int32, device=device
        )
        _key_bounds_kernel[(capacity, batch.num_requests * heads)](
            given.tensor,
            given.spans,
            batch.context_lens,
            key_bounds,
            given.width,
            given.batch,
            given.head,
            heads,
            capacity,
            BN=tile.keys,
            VECTORS=given.vectors,
            CAUSAL=given.causal,
            SHARED=given.shared,
            num_warps=1,
        )
    _plan_kernel[(len(items), heads)](
        items,
        batch.query_starts,
        batch.context_lens,
        key_bounds,
        given.tensor,
        given.spans,
        tiles,
        counts,
        given.batch,
        given.head,
        capacity,
        G=group,
        BM=tile.rows,
        BN=tile.keys,
        ROWS=triton.next_power_of_2(-(-tile.rows // group) + 1),
        RANGES=given.ranges,
        SHARED=given.shared,
        SEGMENT=SEGMENTS[segment],
        PAGE=batch.page_size,
        LANES=LANES,
        num_warps=1,
    )
    return MaskPlan(items, tiles, counts)
