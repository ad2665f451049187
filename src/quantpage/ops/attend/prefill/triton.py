"""Prefill on any CUDA GPU: the portable kernel, over pages or over a 16-bit workspace.

The host side of triton_kernel: views in, nothing read back. Requests with many rows go
through a workspace (prefill/ways), which is a layer of unquantized pages to the same kernel; the
others, and exact pages, are dequantized in registers.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.ops import refusals
from quantpage.ops.attend.decode.triton import attend as decode_entry
from quantpage.ops.attend.decode.triton import decode_into
from quantpage.ops.attend.flash.tiles import portable_tile, portable_width, processors_of
from quantpage.ops.attend.flash.triton_launch import (
    compiled,
    operand_dtype,
    parts_for,
    strides,
    workspace_dtype,
)
from quantpage.ops.attend.params import SEGMENTS, AttendParams, Segment, exponent_scale, reach_of
from quantpage.ops.attend.prefill.plan import (
    DensePass,
    DenseShape,
    Work,
    plan_pages,
    plan_passes,
)
from quantpage.ops.attend.prefill.triton_kernel import prefill_pages_kernel
from quantpage.ops.attend.prefill.triton_workspace import fill_workspace, merge_parts, on_device
from quantpage.ops.attend.prefill.ways import Launches, attend_by_ways
from quantpage.ops.attend.results import Asked, Results, kernel
from quantpage.ops.checks import Needs
from quantpage.ops.operand import NO_SCALES, Operand, dense_operand, halves


@kernel(Needs(refusals.PREFILL_TRITON, kind="cuda", phase="prefill"))
def attend(
    q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, asked: Asked
) -> Results:
    """Each request over its pages, or over a workspace of them; ``out`` if it is contiguous."""
    return attend_by_ways(q, layer, batch, params, LAUNCHES, asked)


def attend_pages(results: Results, q, layer, batch, params, segment: Segment, members) -> None:
    """The requests of a step that read pages as they lie; members None: all."""
    lens = (batch.query_lens, batch.host_context_lens)
    rows = max(lens[0][r] for r in (range(len(lens[0])) if members is None else members))
    both, rule = halves(layer), (segment, batch.page_size)
    itemsize = max(operand_dtype(each).itemsize for each in both)
    shape, warps = _shape(q, layer, params, rows, (itemsize, 1))
    planned = _device_pages(*lens, shape, warps, members, str(q.device))
    _launch(results, q, both, batch.page_table, params, rule, planned)


def _attend_workspace(results: Results, q, layer, batch, params, segment, members) -> None:
    """Pages to a workspace, which the kernel reads as pages of one key tile each."""
    lens = (batch.query_lens, batch.host_context_lens)
    dtype = workspace_dtype(layer)
    shape, warps = _shape(q, layer, params, max(lens[0]), (dtype.itemsize, dtype.itemsize))
    key, value = halves(layer)
    rule = (segment, batch.page_size)
    passes = _device_passes(*lens, shape, warps, members, str(q.device))
    for each, spans, table, planned in passes:
        k, v = fill_workspace(each, spans, layer, batch.page_table, dtype)
        dense = (
            dense_operand(k, shape.tile.keys, key._replace(scales=NO_SCALES)),
            dense_operand(v, shape.tile.keys, value, each.head0),
        )
        _launch(results, q, dense, table, params, rule, planned, each.head0)


class _Planned(NamedTuple):
    """One launch: its work on the device, and how it is cut."""

    order: Tensor
    items: Tensor
    parts: int
    """Partial results a row."""
    shape: DenseShape
    warps: int


def _launch(
    results: Results,
    q: Tensor,
    pages: tuple[Operand, Operand],
    table: Tensor,
    params: AttendParams,
    rule: tuple[Segment, int],
    planned: _Planned,
    head0: int = 0,
) -> None:
    """pages: K and V, in pages that ``table`` names. rule: a segment, and the page size of it.

    head0: kv_heads of the layer before the first of ``pages``.
    """
    order, items, parts, shape, warps = planned
    key, value = pages
    tokens, q_heads, _ = q.shape
    target = results if parts == 1 else parts_for(results, parts)
    sinks = params.sinks is not None and parts == 1
    mask = params.mask
    scale, cap = exponent_scale(params)
    prefill_pages_kernel[(order.shape[0],)](
        q,
        *key.planes,
        *value.planes,
        table,
        order,
        items,
        target.out,
        target.lse,
        params.sinks if sinks else None,
        key.codes.shape[1],
        head0,
        q_heads,
        tokens * q_heads,
        q.stride(0),
        q.stride(1),
        table.stride(0),
        *strides(key, value),
        scale,
        cap,
        shape.window or 0,
        shape.sink_tokens,
        SLOTS=key.page_size,
        PAGE=rule[1],
        WINDOW=shape.window is not None,
        CAUSAL=mask.kind == "causal",
        SEGMENT=SEGMENTS[rule[0]],
        SOFTCAP=params.softcap is not None,
        SINKS=sinks,
        **compiled(key, value, shape.group, shape.tile, q.device),
        num_warps=warps,
    )
    if parts > 1:
        merge_parts(target, params.sinks, results)


def _shape(
    q: Tensor,
    layer: LayerKV,
    params: AttendParams,
    longest: int,
    sizes: tuple[int, int],
) -> tuple[DenseShape, int]:
    """sizes: bytes of a number in products, and where it is read."""
    itemsize, stored = sizes
    group = q.shape[1] // layer.kv_heads
    head_dim, width = layer.key.head_dim, layer.value.head_dim
    widest = max(portable_width(head_dim), portable_width(width))
    limit = device_info(q.device).shared_bytes
    tile, warps = portable_tile(widest, longest * group, itemsize, limit)
    window, sink_tokens = reach_of(params.mask)
    shape = DenseShape(
        kv_heads=layer.kv_heads,
        group=group,
        row_bytes=stored * (head_dim + width),
        tile=tile,
        window=window,
        sink_tokens=sink_tokens,
        processors=processors_of(q.device),
        persistent=False,
    )
    return shape, warps


@lru_cache(maxsize=32)
def _device_pages(
    query_lens, context_lens, shape: DenseShape, warps: int, members, device: str
) -> _Planned:
    """The step's tables on the device: every layer of a step shares them."""
    work = plan_pages(query_lens, context_lens, shape, members)
    return _planned(work, shape, warps, device)


@lru_cache(maxsize=32)
def _device_passes(
    query_lens, context_lens, shape: DenseShape, warps: int, members, device: str
) -> tuple[tuple[DensePass, Tensor, Tensor, _Planned], ...]:
    """Passes over a workspace, each with its spans, page table and work on the device."""
    made = []
    for each in plan_passes(query_lens, context_lens, shape, members):
        planned = _planned(each.work, shape, warps, device)
        table = _workspace_table(each, len(query_lens), max(context_lens), shape)
        made.append((each, on_device(each.spans, device), on_device(table, device), planned))
    return tuple(made)


def _planned(work: Work, shape: DenseShape, warps: int, device: str) -> _Planned:
    # Programs take one tile each: the first round is the only one.
    order, items = on_device(work.order[0], device), on_device(work.items, device)
    return _Planned(order, items, work.parts, shape, warps)


def _workspace_table(each: DensePass, requests: int, longest: int, shape: DenseShape) -> np.ndarray:
    """Key tile of a request -> tile of the workspace, -1 where the workspace has none."""
    keys = shape.tile.keys
    table = np.full((requests, -(-longest // keys) + 1), -1, dtype=np.int32)
    for request, first, count, _, row in each.spans:
        # Spans share tiles at their borders and agree there.
        tiles = np.arange(first // keys, -(-(first + count) // keys))
        table[request, tiles] = (row - first % keys) // keys + tiles - first // keys
    return table


LAUNCHES = Launches("triton", _attend_workspace, attend_pages, decode_into, decode_entry)
