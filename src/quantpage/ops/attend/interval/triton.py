"""Interval masks on any CUDA GPU: plan the visits, then attend to the listed tiles of pages.

Three launches a call (bounds of key tiles, lists, attention; the first two once a step), and a
merge where a short step is cut into splits. Nothing is read back, shapes depend on host integers
only: the call can be captured.
"""

from functools import lru_cache

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.masks import ColumnIntervals, Mask, RowIntervals
from quantpage.ops import refusals
from quantpage.ops.attend.flash.tiles import DenseTile, portable_tile, portable_width
from quantpage.ops.attend.flash.triton_launch import (
    compiled,
    operand_dtype,
    parts_for,
    strides,
)
from quantpage.ops.attend.interval.once import once_a_step
from quantpage.ops.attend.interval.plan import MaskTile, lower
from quantpage.ops.attend.interval.triton_kernel import flash_mask_kernel
from quantpage.ops.attend.interval.triton_plan import mask_arguments, plan_tiles
from quantpage.ops.attend.merge import merge_partials
from quantpage.ops.attend.params import SEGMENTS, AttendParams, exponent_scale
from quantpage.ops.attend.results import Asked, Results, contiguous, kernel, results_for
from quantpage.ops.checks import Needs
from quantpage.ops.operand import Operand, halves

MIN_SPLIT_TILES = 4
"""Smallest share of a split: a partial result costs a write and a merge."""
MAX_SPLITS = 32


@lru_cache(maxsize=16)
def lowered(mask: Mask, device: torch.device) -> ColumnIntervals | RowIntervals:
    """The form that kernels read, on ``device``: copied once a mask."""
    return lower(mask.to(device))


@kernel(Needs(refusals.INTERVAL_TRITON, kind="cuda"))
def attend(
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    asked: Asked,
    splits: int | None = None,
) -> Results:
    """splits: programs that share a query tile's list; None: enough to fill the device.

    ``out`` is written to if it is contiguous.
    """
    width, segment = layer.value.head_dim, asked.segment
    results = results_for(q, width, segment == "all", contiguous(asked.out), asked.lse)
    if not q.shape[0]:
        return results
    group = q.shape[1] // layer.kv_heads
    both = halves(layer)
    tile, warps = _tile(both, group * batch.max_query_len, q.device)
    form = lowered(params.mask, q.device)
    shape = (group, MaskTile(tile.rows, tile.keys), segment)
    plan = once_a_step(form, batch, shape, lambda: plan_tiles(form, batch, *shape))
    if splits is None:
        splits = _splits(q, len(plan.items) * layer.kv_heads, plan.tiles.shape[-1])
    parts = results if splits == 1 else parts_for(results, splits)
    _launch(parts, splits, q, both, batch, params, (plan, form, tile, warps), segment)
    if splits == 1:
        return results
    assert parts.lse is not None
    _, lse = merge_partials(list(parts.out.unbind()), list(parts.lse.unbind()), out=results.out)
    return Results(results.out, lse if asked.lse else None)


def _tile(pages: tuple[Operand, Operand], rows: int, device: torch.device) -> tuple[DenseTile, int]:
    """rows: packed, of the longest request."""
    widest = max(portable_width(each.head_dim) for each in pages)
    itemsize = max(operand_dtype(each).itemsize for each in pages)
    return portable_tile(widest, rows, itemsize, device_info(device).shared_bytes)


def _splits(q: Tensor, programs: int, capacity: int) -> int:
    """Twice the device's processors in all, no share under MIN_SPLIT_TILES."""
    wanted = -(-2 * device_info(q.device).processors // programs)
    return max(1, min(wanted, capacity // MIN_SPLIT_TILES, MAX_SPLITS))


def _launch(
    results: Results, splits: int, q, pages, batch, params: AttendParams, planned, segment
) -> None:
    """planned: tiles to visit, the lowered mask, the tile, warps."""
    (out, lse), (plan, form, tile, warps), (key, value) = results, planned, pages
    q = q if q.stride(-1) == 1 else q.contiguous()
    kv_heads = key.codes.shape[1]
    scale, cap = exponent_scale(params)
    given = mask_arguments(form, q.device)
    flash_mask_kernel[(len(plan.items), kv_heads, splits)](
        q,
        *key.planes,
        *value.planes,
        batch.page_table,
        batch.query_starts,
        batch.context_lens,
        plan.items,
        plan.tiles,
        plan.counts,
        given.tensor,
        given.spans,
        out,
        lse,
        params.sinks,
        kv_heads,
        splits,
        q.shape[0] * q.shape[1],
        given.width,
        given.batch,
        given.head,
        plan.tiles.shape[-1],
        q.stride(0),
        q.stride(1),
        batch.page_table.stride(0),
        *strides(key, value),
        scale,
        cap,
        PAGE=key.page_size,
        SEGMENT=SEGMENTS[segment],
        SOFTCAP=params.softcap is not None,
        SINKS=params.sinks is not None,
        **given.compiled,
        **compiled(key, value, q.shape[1] // kv_heads, tile, q.device),
        num_warps=warps,
    )
