"""Prefill on any CUDA GPU: the portable kernel, over pages or over a 16-bit workspace.

The host side of triton_kernel: views in, nothing read back. Requests with many rows go
through a workspace (prefill/ways), which is a layer of unquantized pages to the same kernel; the
others, and exact pages, are dequantized in registers.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.masks import CausalMask, FullMask
from quantpage.ops import refusals
from quantpage.ops.attend.decode.triton import attend as decode
from quantpage.ops.attend.params import SEGMENTS, AttendParams, Segment
from quantpage.ops.attend.prefill.plan import (
    DensePass,
    DenseShape,
    DenseTile,
    plan_pages,
    plan_passes,
)
from quantpage.ops.attend.prefill.triton_kernel import prefill_pages_kernel
from quantpage.ops.attend.prefill.ways import Ways, choose_ways, take_requests
from quantpage.ops.attend.triton_merge import merge_partials
from quantpage.ops.checks import Needs, attends, serves, unchecked
from quantpage.ops.gather.triton import gather_layer
from quantpage.ops.operand import NO_SCALES, Operand, dense_operand, operand

LOG2E = math.log2(math.e)
OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def pages_tile(head_dim: int, rows: int) -> tuple[DenseTile, int]:
    """Tile and warps for a padded head_dim and the most packed rows of one request.

    H200, 1 x 16k causal, head_dim 128, TFLOP/s: from int8 pages 242 with 64 rows and 4 warps, 222
    with 128 and 8; over a float16 workspace 377 and 318 (128 x 128: 358, with spills).
    """
    if rows <= 16:
        return DenseTile(rows=16, keys=64, stages=3), 4
    if head_dim <= 128:
        return DenseTile(rows=64, keys=64, stages=3), 4
    return DenseTile(rows=64, keys=32, stages=2), 4


@attends(Needs(refusals.PREFILL_TRITON, kind="cuda", phase="prefill"))
def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    segment: Segment = "all",
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """Output (the query's dtype; float32 for a segment) and natural log-sum-exp in float32."""
    if not isinstance(params.mask, CausalMask | FullMask):
        raise ValueError(f"mask: expected a causal or full mask, got {params.mask.kind}")
    out, lse = empty_results(q, layer, segment)
    q = q if q.stride(-1) == 1 else q.contiguous()
    ways = Ways(pages=None)
    if segment != "exact":
        group = q.shape[1] // layer.kv_heads
        decodes = segment == "all" and serves(decode, q, layer, "decode", params.mask.kind)
        ways = choose_ways(batch.query_lens, group, "triton", decodes)
    if ways.workspace != ():
        _attend_workspace((out, lse), q, layer, batch, params, segment, ways.workspace)
    decode_rows((out, lse), q, layer, batch, params, ways.decode, decode)
    attend_pages((out, lse), q, layer, batch, params, segment, ways.pages)
    return out, lse


def decode_rows(results, q, layer, batch, params, members, decode) -> None:
    """The requests of a step that are decodes, by a decode kernel's ``attend``."""
    if members:
        out, lse = results
        taken, rows = take_requests(batch, members)
        out[rows], lse[rows] = unchecked(decode)(q[rows], layer, taken, params)


def attend_pages(results, q, layer, batch, params, segment: Segment, members) -> None:
    """The requests of a step that read pages as they lie; members None: all."""
    if members != () and batch.num_tokens:
        lens = (batch.query_lens, batch.host_context_lens)
        rows = max(lens[0][r] for r in (range(len(lens[0])) if members is None else members))
        shape, warps = _pages_shape(q, layer, params, rows, 1)
        planned = _device_pages(*lens, shape, members, str(q.device))
        halves, rule = (operand(layer.key), operand(layer.value)), (segment, batch.page_size)
        _launch(results, q, halves, batch.page_table, params, rule, planned, warps)


def empty_results(q: Tensor, layer: LayerKV, segment: Segment) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp to be written: a segment stays in float32 until it is merged."""
    dtype = q.dtype if segment == "all" else torch.float32
    out = torch.empty(*q.shape[:2], layer.value.head_dim, dtype=dtype, device=q.device)
    return out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def workspace_dtype(layer: LayerKV, query_dtype: torch.dtype) -> torch.dtype:
    """float16 where numbers are code * scale, else the dtype of the cache."""
    if layer.key.spec.quantized or layer.value.spec.quantized:
        return torch.float16
    return layer.key.codes.dtype


def fill_workspace(
    each: DensePass, spans: Tensor, layer: LayerKV, page_table: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[heads, rows, head_dim] of K and of V; torch's allocator keeps the memory between layers."""
    heads, rows, device = each.heads, each.rows, page_table.device
    k = torch.empty(heads, rows, layer.key.head_dim, dtype=dtype, device=device)
    v = torch.empty(heads, rows, layer.value.head_dim, dtype=dtype, device=device)
    gather_layer(layer, page_table, spans, each.max_span, (k, v), each.head0)
    return k, v


def merge_parts(
    part_out: Tensor, part_lse: Tensor, sinks: Tensor | None, results: tuple[Tensor, Tensor]
) -> None:
    """Parts [parts, tokens, ...] in float32 into ``results``; the parts are used up."""
    outs, lses = list(part_out.unbind()), list(part_lse.unbind())
    if len(outs) > 2:
        # All but the last into the first, so that nothing between is rounded to 16 bits.
        merge_partials(outs[:-1], lses[:-1], out=outs[0], lse=lses[0])
    ends = [outs[0], outs[-1]], [lses[0], lses[-1]]
    merge_partials(*ends, sinks, out=results[0], lse=results[1])


def exponent_scale(params: AttendParams) -> tuple[float, float]:
    """What scores are multiplied by for exp2, and the cap per log2."""
    if params.softcap is None:
        return params.softmax_scale * LOG2E, 0.0
    # exp2(x * 2 log2e) is what tanh(x) is made of.
    return 2 * params.softmax_scale / params.softcap * LOG2E, params.softcap * LOG2E


def _attend_workspace(results, q, layer, batch, params, segment, members) -> None:
    """Pages to a workspace, which the kernel reads as pages of one key tile each."""
    lens = (batch.query_lens, batch.host_context_lens)
    shape, warps = _pages_shape(q, layer, params, max(lens[0]), 2)
    dtype = workspace_dtype(layer, q.dtype)
    key, value = operand(layer.key), operand(layer.value)
    rule = (segment, batch.page_size)
    for each, spans, table, planned in _device_passes(*lens, shape, members, str(q.device)):
        k, v = fill_workspace(each, spans, layer, batch.page_table, dtype)
        halves = (
            dense_operand(k, shape.tile.keys, key._replace(scales=NO_SCALES)),
            dense_operand(v, shape.tile.keys, value, each.head0),
        )
        _launch(results, q, halves, table, params, rule, planned, warps, each.head0)


def _launch(results, q, halves, table, params, rule, planned, warps: int, head0: int = 0) -> None:
    """One launch; halves: operands of K and V. rule: the segment and the page size that defines it.

    planned: order, items, parts, shape. head0: the q_heads of the layer's first kv_head.
    """
    (out, lse), (order, items, parts, shape) = results, planned
    key: Operand
    value: Operand
    key, value = halves
    tokens, q_heads, _ = q.shape
    target, target_lse = out, lse
    if parts > 1:
        target = torch.empty(parts, *out.shape, dtype=torch.float32, device=q.device)
        target_lse = torch.empty(parts, tokens, q_heads, dtype=torch.float32, device=q.device)
    sinks = params.sinks is not None and parts == 1
    number = operand_dtype(key, value)
    capability = device_info(q.device).capability
    mask, tile = params.mask, shape.tile
    scale, cap = exponent_scale(params)
    prefill_pages_kernel[(order.shape[0],)](
        q,
        *key.planes,
        *value.planes,
        table,
        order,
        items,
        target,
        target_lse,
        params.sinks if sinks else lse,
        key.codes.shape[1],
        head0,
        q_heads,
        tokens * q_heads,
        q.stride(0),
        q.stride(1),
        table.stride(0),
        *key.strides,
        *value.strides,
        *key.scale_strides,
        *value.scale_strides,
        scale,
        cap,
        shape.window or 0,
        shape.sink_tokens,
        G=shape.group,
        D=key.head_dim,
        DV=value.head_dim,
        DP=padded_width(key.head_dim),
        DVP=padded_width(value.head_dim),
        BM=tile.rows,
        BN=tile.keys,
        SLOTS=key.page_size,
        PAGE=rule[1],
        K_CODE=key.code,
        V_CODE=value.code,
        K_SCALED=key.scaled,
        V_SCALED=value.scaled,
        K_ZERO=key.has_zero,
        V_ZERO=value.has_zero,
        K_GROUPS=key.groups,
        V_GROUPS=value.groups,
        WINDOW=shape.window is not None,
        CAUSAL=mask.kind == "causal",
        SEGMENT=SEGMENTS[rule[0]],
        SOFTCAP=params.softcap is not None,
        SINKS=sinks,
        SHIFT=8 if number == torch.float16 else 0,
        OLD=capability is not None and capability < (8, 9),
        STAGES=tile.stages,
        OPERAND=OPERANDS[number],
        num_warps=warps,
    )
    if parts > 1:
        merge_parts(target, target_lse, params.sinks, results)


def operand_dtype(key: Operand, value: Operand) -> torch.dtype:
    """Of queries and probabilities in products: float16 beside codes, else the pages' own."""
    return torch.float16 if key.code or value.code else key.codes.dtype


def _pages_shape(
    q: Tensor, layer: LayerKV, params: AttendParams, longest: int, itemsize: int
) -> tuple[DenseShape, int]:
    mask, group = params.mask, q.shape[1] // layer.kv_heads
    head_dim, width = layer.key.head_dim, layer.value.head_dim
    tile, warps = pages_tile(max(padded_width(head_dim), padded_width(width)), longest * group)
    shape = DenseShape(
        kv_heads=layer.kv_heads,
        group=group,
        row_bytes=itemsize * (head_dim + width),
        tile=tile,
        window=mask.window if isinstance(mask, CausalMask) else None,
        sink_tokens=mask.sink_tokens if isinstance(mask, CausalMask) else 0,
        processors=device_info(q.device).processors if q.is_cuda else 3,
        persistent=False,
    )
    return shape, warps


@lru_cache(maxsize=32)
def _device_pages(query_lens, context_lens, shape: DenseShape, members, device: str):
    """The step's tables on the device: every layer of a step shares them."""
    work = plan_pages(query_lens, context_lens, shape, members)
    return _on_device(work.order[0], device), _on_device(work.items, device), work.parts, shape


@lru_cache(maxsize=32)
def _device_passes(query_lens, context_lens, shape: DenseShape, members, device: str):
    """Passes over a workspace, each with its spans, page table and work on the device."""
    made = []
    for each in plan_passes(query_lens, context_lens, shape, members):
        work = each.work
        planned = (
            _on_device(work.order[0], device),
            _on_device(work.items, device),
            work.parts,
            shape,
        )
        table = _workspace_table(each, len(query_lens), max(context_lens), shape)
        made.append((each, _on_device(each.spans, device), _on_device(table, device), planned))
    return tuple(made)


def _workspace_table(each: DensePass, requests: int, longest: int, shape: DenseShape) -> np.ndarray:
    """Key tile of a request -> tile of the workspace, -1 where the workspace has none."""
    keys = shape.tile.keys
    table = np.full((requests, -(-longest // keys) + 1), -1, dtype=np.int32)
    for request, first, count, _, row in each.spans:
        # Spans share tiles at their borders and agree there.
        tiles = np.arange(first // keys, -(-(first + count) // keys))
        table[request, tiles] = (row - first % keys) // keys + tiles - first // keys
    return table


def _on_device(table: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(table).to(device)


def padded_width(head_dim: int) -> int:
    """Channels of a tile: a power of two, at least a matrix product's 16."""
    return max(16, 1 << (head_dim - 1).bit_length())
