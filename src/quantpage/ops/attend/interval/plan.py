"""Which key tiles a query tile has to visit: the planner of interval masks, in torch.

For a tile of queries at positions [r0, r1) and a tile of keys [k0, k1):

    full      every query sees every key: runs without mask code
    partial   some pairs are visible: runs with it
    empty     none is: not read

A key tile is judged by the smallest and largest of its four bounds (FlashMask, arXiv 2410.01359
section 4.1), a query tile of a row mask by those of its ranges. That never calls a tile empty or
full that is not; it may call one partial that is empty (two intervals that together hide it) or
full.

``plan_tiles`` is the oracle of the device planner (triton_plan) and lays its answer out in the
same way: one list of fixed capacity a query tile and mask head, full tiles ascending from the
front, partial tiles from the back.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.masks import END, ColumnIntervals, Mask, RowIntervals
from quantpage.ops.attend.params import Segment, exact_band

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, slots=True)
class MaskTile:
    """A kernel's tile: packed rows (a token and a query head of one kv_head) by keys."""

    rows: int
    keys: int


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """The visits of one step."""

    items: Int[Tensor, "items 2"]
    """Request and first packed row of each query tile."""
    tiles: Int[Tensor, "items heads capacity"]
    """Key tiles: full ones from the front, partial ones from the back."""
    counts: Int[Tensor, "items heads 2"]
    """How many are full, how many partial."""


def lower(mask: Mask) -> ColumnIntervals | RowIntervals:
    """The form that planners and kernels read; ValueError for a mask without one."""
    form = mask.form
    if isinstance(form, ColumnIntervals | RowIntervals):
        return form
    raise ValueError(f"mask: expected an interval mask, got {type(mask).__name__}")


def tile_kinds(
    mask: Mask,
    queries: tuple[int, int],
    keys: tuple[int, int],
    tile: int,
    request: int = 0,
    kv_head: int = 0,
) -> Int[Tensor, " tiles"]:
    """EMPTY, PARTIAL or FULL of the key tiles from keys[0] on, for queries [first, end)."""
    form = lower(mask)
    starts = torch.arange(keys[0], keys[1], tile, device="cpu")
    ends = (starts + tile).clamp(max=keys[1])
    if isinstance(form, RowIntervals):
        rows = form.visible_ranges(torch.arange(*queries, device="cpu"), request, kv_head).cpu()
        return _row_kinds(rows, starts, ends)
    low, high = _key_bounds(form, keys, tile, request, kv_head)
    return _column_kinds(low, high, *queries)


def _key_bounds(mask, keys, tile, request, kv_head) -> tuple[Tensor, Tensor]:
    """Smallest and largest lts, lte, uts, ute of each tile, [tiles, 4] each."""
    positions = torch.arange(*keys, device="cpu")
    vectors = torch.stack(mask.hidden_rows(positions, request, kv_head), -1).cpu()
    tiles = -(-len(positions) // tile)
    # The last key stands in for those after it, which leaves its tile's bounds alone.
    index = torch.arange(tiles * tile, device="cpu").clamp(max=max(len(positions) - 1, 0))
    padded = vectors[index].view(tiles, tile, 4)
    return padded.amin(1), padded.amax(1)


def _column_kinds(low: Tensor, high: Tensor, first: int, end: int) -> Tensor:
    hidden = torch.zeros(len(low), dtype=torch.bool, device="cpu")
    touched = torch.zeros_like(hidden)
    for start, stop in ((0, 1), (2, 3)):
        hidden |= (first >= high[:, start]) & (end <= low[:, stop])
        touched |= (end > low[:, start]) & (first < high[:, stop])
    return torch.where(hidden, EMPTY, torch.where(touched, PARTIAL, FULL))


def _row_kinds(ranges: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    full = torch.zeros(len(starts), dtype=torch.bool, device="cpu")
    seen = torch.zeros_like(full)
    for slot in ranges.unbind(1):
        empty = slot[:, 0] >= slot[:, 1]
        low, high = slot[:, 0].masked_fill(empty, END), slot[:, 1].masked_fill(empty, 0)
        full |= (starts >= low.amax()) & (ends <= high.amin())
        seen |= (ends > low.amin()) & (starts < high.amax())
    return torch.where(full, FULL, torch.where(seen, PARTIAL, EMPTY))


def segment_kinds(
    kinds: Tensor, queries: tuple[int, int], tile: int, page_size: int, segment: Segment
) -> Tensor:
    """``kinds`` of tiles from key 0 on, where only the pages of ``segment`` take part."""
    if segment == "all":
        return kinds
    starts = torch.arange(len(kinds), device="cpu") * tile
    ends = starts + tile
    low, high = exact_band(queries[0], queries[1] - 1, page_size)
    near = (starts < page_size) | ((starts < high) & (ends > low))
    if segment == "exact":
        return torch.where(near, kinds.clamp(max=PARTIAL), EMPTY)
    kinds = torch.where(near, kinds.clamp(max=PARTIAL), kinds)
    return torch.where(ends <= page_size, EMPTY, kinds)


def query_tiles(query_lens: tuple[int, ...], group: int, rows: int) -> Int[Tensor, "items 2"]:
    """Request and first packed row of every query tile, int32."""
    items = [
        (request, first)
        for request, new in enumerate(query_lens)
        for first in range(0, new * group, rows)
    ]
    return torch.tensor(items, dtype=torch.int32, device="cpu").view(-1, 2)


def plan_tiles(
    mask: Mask, batch: BatchPlan, group: int, tile: MaskTile, segment: Segment = "all"
) -> MaskPlan:
    """The plan of one step, on the CPU, from the host's lengths."""
    form = lower(mask)
    tensor = form.bounds if isinstance(form, ColumnIntervals) else form.intervals
    heads = tensor.shape[1]
    items = query_tiles(batch.query_lens, group, tile.rows)
    capacity = max(1, -(-batch.max_context_len // tile.keys))
    tiles = torch.full((len(items), heads, capacity), -1, dtype=torch.int32, device="cpu")
    counts = torch.zeros(len(items), heads, 2, dtype=torch.int32, device="cpu")
    for item, (request, row) in enumerate(items.tolist()):
        context = batch.host_context_lens[request]
        new = batch.query_lens[request]
        last = min(row + tile.rows, new * group) - 1
        queries = context - new + row // group, context - new + last // group + 1
        for head in range(heads):
            kinds = tile_kinds(form, queries, (0, context), tile.keys, request, head)
            kinds = segment_kinds(kinds, queries, tile.keys, batch.page_size, segment)
            if context % tile.keys:
                # The last tile has keys that are not there.
                kinds[-1] = kinds[-1].clamp(max=PARTIAL)
            full, partial = ((kinds == each).nonzero().flatten().int() for each in (FULL, PARTIAL))
            tiles[item, head, : len(full)] = full
            tiles[item, head, capacity - len(partial) :] = partial.flip(0)
            counts[item, head] = torch.tensor([len(full), len(partial)], device="cpu")
    return MaskPlan(items, tiles, counts)
