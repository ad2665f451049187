"""Interval masks in prefill on Hopper: a 16-bit workspace and the tiles that the planner listed.

As prefill/gluon (read that first), for masks: pages are dequantized once into a workspace, the
planner lists what each query tile visits, and the kernel visits it. When the workspace would exceed
its cap, passes run over kv_heads. Exact pages are few keys a query and go to the portable kernel.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.masks import ColumnIntervals, RowIntervals
from quantpage.ops import refusals
from quantpage.ops.attend.flash.gluon_launch import compiled, descriptor, value_scales
from quantpage.ops.attend.flash.tiles import WORKSPACE_BYTES, hopper_tile
from quantpage.ops.attend.flash.triton_launch import workspace_dtype
from quantpage.ops.attend.interval.gluon_kernel import mask_kernel
from quantpage.ops.attend.interval.once import once_a_step
from quantpage.ops.attend.interval.plan import MaskPlan, MaskTile
from quantpage.ops.attend.interval.triton import attend as portable
from quantpage.ops.attend.interval.triton import lowered
from quantpage.ops.attend.interval.triton_plan import mask_arguments, plan_tiles, visit_order
from quantpage.ops.attend.params import AttendParams, exponent_scale
from quantpage.ops.attend.results import Asked, Results, contiguous, kernel, results_for
from quantpage.ops.checks import Needs, unchecked
from quantpage.ops.gather.triton import gather_layer
from quantpage.ops.operand import Operand, given_values

FEW_ROWS = 256
"""Packed rows a request up to which pages are read directly: a workspace would be written for two
query tiles at most. Not tuned: a bound below which the gather cannot pay."""


@dataclass(frozen=True, slots=True)
class MaskStep:
    """What a step's lengths decide: the workspace's rows and the work over it."""

    group: int
    rows: int
    """Workspace rows a head."""
    longest: int
    spans: Tensor
    """int32 [requests, 5] (gather): request, 0, rows to write, context, first row."""
    work: Tensor
    """int32 [items, 8]: see gluon_kernel.WORK_FIELDS, in the order of the plan's items."""


@lru_cache(maxsize=32)
def mask_step(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    group: int,
    tile: MaskTile,
    device: str,
) -> MaskStep:
    """The tables of one step on the device: every layer of a step shares them."""
    starts = [0, *accumulate(query_lens)]
    spans, work, row = [], [], 0
    for request, (new, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        if not new:
            continue
        length = -(-context // tile.keys) * tile.keys
        spans.append((request, 0, length, context, row))
        work += [
            (starts[request], new, context - new, first, row, request, context, 0)
            for first in range(0, new * group, tile.rows)
        ]
        row += length
    return MaskStep(
        group,
        row,
        max(span[2] for span in spans),
        torch.tensor(spans, dtype=torch.int32, device="cpu").to(device),
        torch.tensor(work, dtype=torch.int32, device="cpu").to(device),
    )


def heads_a_pass(kv_heads: int, head_bytes: int) -> int:
    """kv_heads whose K and V the workspace holds at once, in passes of about one size."""
    most = max(1, min(kv_heads, WORKSPACE_BYTES // head_bytes))
    return -(-kv_heads // -(-kv_heads // most))


@kernel(Needs(refusals.INTERVAL_GLUON, kind="cuda", phase="prefill"))
def attend(
    q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, asked: Asked
) -> Results:
    """As interval/triton.attend."""
    width, group, segment = layer.value.head_dim, q.shape[1] // layer.kv_heads, asked.segment
    if segment == "exact" or group * batch.max_query_len <= FEW_ROWS:
        return unchecked(portable)(q, layer, batch, params, *asked)
    results = results_for(q, width, segment == "all", contiguous(asked.out), asked.lse)
    dense = hopper_tile(layer.key.head_dim, width)
    tile = MaskTile(dense.rows, dense.keys)
    step = mask_step(batch.query_lens, batch.host_context_lens, group, tile, str(q.device))
    form = lowered(params.mask, q.device)

    def planned() -> tuple[MaskPlan, Tensor]:
        plan = plan_tiles(form, batch, group, tile, segment)
        return plan, visit_order(plan)

    plan, order = once_a_step(form, batch, ("ordered", group, tile, segment), planned)
    dtype = workspace_dtype(layer)
    row_bytes = (layer.key.head_dim + width) * dtype.itemsize
    heads = heads_a_pass(layer.kv_heads, step.rows * row_bytes)
    k = torch.empty(heads, step.rows, layer.key.head_dim, dtype=dtype, device=q.device)
    v = torch.empty(heads, step.rows, width, dtype=dtype, device=q.device)
    for head0 in range(0, layer.kv_heads, heads):
        count = min(heads, layer.kv_heads - head0)
        rows = (k[:count], v[:count])
        gather_layer(layer, batch.page_table, step.spans, step.longest, rows, head0)
        launch(
            q,
            rows,
            results,
            params,
            (step, plan, form, order),
            head0,
            body_page=batch.page_size if segment == "body" else 0,
            values=given_values(layer),
        )
    return results


def launch(
    q: Tensor,
    workspace: tuple[Tensor, Tensor],
    results: Results,
    params: AttendParams,
    planned: tuple[MaskStep, MaskPlan, ColumnIntervals | RowIntervals, Tensor],
    head0: int = 0,
    body_page: int = 0,
    values: Operand | None = None,
) -> None:
    """One pass over the kv_heads that the workspace holds, from ``head0`` on.

    values: whose scales are given, so that the workspace holds their codes; None: numbers.
    """
    (k, v), (out, lse), (step, plan, form, order) = workspace, results, planned
    q = q if q.stride(-1) == 1 else q.contiguous()
    heads, tile = k.shape[0], hopper_tile(k.shape[2], v.shape[2])
    scale, cap = exponent_scale(params)
    given_scales, scaled = value_scales(values)
    items = len(step.work)
    grid = min(items * heads, device_info(q.device).processors)
    given = mask_arguments(form, q.device)
    mask_kernel[(grid,)](
        q,
        descriptor(k, tile.keys),
        descriptor(v, tile.keys),
        out,
        lse,
        params.sinks,
        *given_scales,
        order,
        step.work,
        plan.tiles,
        plan.counts,
        given.tensor,
        given.spans,
        -(-items * heads // grid),
        items,
        heads,
        head0,
        step.rows,
        q.shape[1],
        q.stride(0),
        q.stride(1),
        scale,
        cap,
        given.width,
        given.batch,
        given.head,
        plan.tiles.shape[-1],
        given.heads,
        max(body_page, 1),
        BODY=body_page > 0,
        SOFTCAP=params.softcap is not None,
        SINKS=params.sinks is not None,
        **given.compiled,
        **compiled(q, k, v, step.group, tile),
        **scaled,
        num_warps=4,
    )
