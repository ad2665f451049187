"""Interval masks on any CUDA GPU: plan the visits, then attend to the listed tiles of pages.

Three launches a call (bounds of key tiles, lists, attention; the first two once a step), and a
merge where a short step is cut into splits. Nothing is read back, shapes depend on host integers
only: the call can be captured.
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.masks import ColumnIntervals, Mask, RowIntervals
from quantpage.ops import refusals
from quantpage.ops.attend.interval.once import once_a_step
from quantpage.ops.attend.interval.plan import MaskTile, lower
from quantpage.ops.attend.interval.triton_kernel import flash_mask_kernel
from quantpage.ops.attend.interval.triton_plan import mask_arguments, plan_tiles
from quantpage.ops.attend.merge import merge_partials
from quantpage.ops.attend.params import SEGMENTS, AttendParams, Segment
from quantpage.ops.attend.prefill.triton import (
    OPERANDS,
    exponent_scale,
    operand_dtype,
    padded_width,
    pages_tile,
)
from quantpage.ops.checks import Needs, attends
from quantpage.ops.operand import operand

MIN_SPLIT_TILES = 4
"""Smallest share of a split: a partial result costs a write and a merge."""
MAX_SPLITS = 32


@lru_cache(maxsize=16)
def lowered(mask: Mask, device: torch.device) -> ColumnIntervals | RowIntervals:
    """The form that kernels read, on ``device``: copied once a mask."""
    return lower(mask.to(device))


@attends(Needs(refusals.INTERVAL_TRITON, kind="cuda"))
def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    segment: Segment = "all",
    splits: int | None = None,
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """Output (the query's dtype; float32 for a segment) and natural log-sum-exp in float32.

    splits: programs that share a query tile's list; None: enough to fill the device.
    """
    tokens, q_heads, _ = q.shape
    width = layer.value.head_dim
    dtype = q.dtype if segment == "all" else torch.float32
    if tokens == 0:
        return q.new_empty(0, q_heads, width, dtype=dtype), q.new_empty(0, q_heads).float()
    group = q_heads // layer.kv_heads
    widest = max(padded_width(layer.key.head_dim), padded_width(width))
    tile, _ = pages_tile(widest, group * batch.max_query_len)
    form = lowered(params.mask, q.device)
    asked = (group, MaskTile(tile.rows, tile.keys), segment)
    plan = once_a_step(form, batch, asked, lambda: plan_tiles(form, batch, *asked))
    if splits is None:
        splits = _splits(q, len(plan.items) * layer.kv_heads, plan.tiles.shape[-1])
    if splits > 1:
        dtype = torch.float32
    out = torch.empty(splits, tokens, q_heads, width, dtype=dtype, device=q.device)
    lse = torch.empty(splits, tokens, q_heads, dtype=torch.float32, device=q.device)
    _launch((out, lse), q, layer, batch, params, (plan, form), segment)
    if splits == 1:
        return out[0], lse[0]
    merged = merge_partials(list(out.unbind()), list(lse.unbind()))
    return merged[0].to(q.dtype if segment == "all" else torch.float32), merged[1]


def _splits(q: Tensor, programs: int, capacity: int) -> int:
    """Twice the device's processors in all, no share under MIN_SPLIT_TILES."""
    wanted = -(-2 * device_info(q.device).processors // programs)
    return max(1, min(wanted, capacity // MIN_SPLIT_TILES, MAX_SPLITS))


def _launch(results, q, layer, batch, params: AttendParams, planned, segment) -> None:
    (out, lse), (plan, form) = results, planned
    q = q if q.stride(-1) == 1 else q.contiguous()
    group = q.shape[1] // layer.kv_heads
    head_dim, width = layer.key.head_dim, layer.value.head_dim
    padded, padded_v = padded_width(head_dim), padded_width(width)
    tile, warps = pages_tile(max(padded, padded_v), group * batch.max_query_len)
    scale, cap = exponent_scale(params)
    key, value = operand(layer.key), operand(layer.value)
    capability = device_info(q.device).capability
    given = mask_arguments(form, q.device)
    columns = isinstance(form, ColumnIntervals)
    flash_mask_kernel[(len(plan.items), layer.kv_heads, out.shape[0])](
        q,
        *key.planes,
        *value.planes,
        batch.page_table,
        batch.query_starts,
        batch.context_lens,
        plan.items,
        plan.tiles,
        plan.counts,
        given["tensor"],
        given["spans"],
        out,
        lse,
        lse if params.sinks is None else params.sinks,
        layer.kv_heads,
        out.shape[0],
        lse.stride(0),
        given["tensor"].shape[-1] if columns else 0,
        given["m_batch"],
        given["m_head"],
        plan.tiles.shape[-1],
        q.stride(0),
        q.stride(1),
        batch.page_table.stride(0),
        *key.strides,
        *value.strides,
        *key.scale_strides,
        *value.scale_strides,
        scale,
        cap,
        G=group,
        D=head_dim,
        DV=width,
        DP=padded,
        DVP=padded_v,
        BM=tile.rows,
        BN=tile.keys,
        PAGE=layer.page_size,
        K_CODE=key.code,
        V_CODE=value.code,
        K_SCALED=key.scaled,
        V_SCALED=value.scaled,
        K_ZERO=key.has_zero,
        V_ZERO=value.has_zero,
        K_GROUPS=key.groups,
        V_GROUPS=value.groups,
        VECTORS=given["tensor"].shape[2] if columns else 1,
        CAUSAL=isinstance(form, ColumnIntervals) and form.causal,
        RANGES=0 if columns else given["tensor"].shape[3],
        PER_HEAD=given["heads"] > 1,
        SHARED=given["shared"],
        SEGMENT=SEGMENTS[segment],
        SOFTCAP=params.softcap is not None,
        SINKS=params.sinks is not None,
        SHIFT=8 if key.code or value.code else 0,
        OLD=capability is not None and capability < (8, 9),
        STAGES=tile.stages,
        OPERAND=OPERANDS[operand_dtype(key, value)],
        num_warps=warps,
    )
