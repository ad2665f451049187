"""Prefill on Hopper: pages to a dense 16-bit workspace, then warp-specialised attention over it.

Dequantizing a key once for a whole chunk, instead of once a query tile, leaves the tensor cores the
only limit: the gather costs about 300 / (chunk tokens * group) of the attention. The workspace
holds what the cache holds, the chunk's own keys and values too, so that results do not depend on
how a prompt was cut.

Numbers of a quantized cache are kept in float16: codes are exact in it and scale times code rounds
to 11 bits (bfloat16: 8). An unquantized cache keeps its dtype.

The exact pages of a format are few keys a query and go to the portable kernel.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon import language as gl

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.masks import CausalMask
from quantpage.ops.attend.gluon_compat import TensorDescriptor
from quantpage.ops.attend.gluon_prefill_kernel import prefill_kernel
from quantpage.ops.attend.params import AttendParams, Segment
from quantpage.ops.attend.prefill_plan import DensePass, DenseShape, DenseTile, plan_passes
from quantpage.ops.gather.triton_gather import gather_rows

LOG2E = 1.4426950408889634
_GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def dense_tile(head_dim: int) -> DenseTile:
    """The tile for a padded head_dim; each fits 227 KB of shared memory and 240 registers."""
    if head_dim <= 128:
        return DenseTile(rows=128, keys=128, stages=2)
    return DenseTile(rows=128, keys=64, stages=2)


def attend(
    q: Float[Tensor, "tokens q_heads head_dim"],
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    segment: Segment = "all",
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """Output (the query's dtype; float32 for a segment) and natural log-sum-exp in float32."""
    if segment == "exact":
        from quantpage.ops.attend.triton_prefill import attend as portable

        return portable(q, layer, batch, params, segment)
    tokens, q_heads, _ = q.shape
    width = layer.value.head_dim
    dtype = torch.float32 if segment == "body" else q.dtype
    out = torch.empty(tokens, q_heads, width, dtype=dtype, device=q.device)
    lse = torch.empty(tokens, q_heads, dtype=torch.float32, device=q.device)
    shape = _shape(q, layer, params)
    passes = _device_passes(batch.query_lens, batch.host_context_lens, shape, str(q.device))
    partial = None
    for each, spans, order, work in passes:
        k, v = _workspaces(each, layer, q)
        gather_rows(layer.key, batch.page_table, spans, each.max_span, k, each.head0)
        gather_rows(layer.value, batch.page_table, spans, each.max_span, v, each.head0)
        if partial is None and not each.final:
            partial = torch.empty(tokens, q_heads, width, dtype=torch.float32, device=q.device)
        launch(
            q,
            (k, v),
            (out if each.final else partial, lse, partial),
            params,
            (each, order, work, shape),
            body_page=batch.page_size if segment == "body" else 0,
        )
    return out, lse


def workspace_dtype(layer: LayerKV, query_dtype: torch.dtype) -> torch.dtype:
    """float16 where numbers are code * scale, else the dtype of the cache."""
    if layer.key.spec.quantized or layer.value.spec.quantized:
        return torch.float16
    return layer.key.codes.dtype if layer.key.codes.dtype in _GLUON_DTYPES else query_dtype


def launch(q, workspace, results, params: AttendParams, planned, body_page=0):
    """One pass: queries against the filled workspace.

    results: (out, lse, float32 partials that carried rows start from).
    planned: (the pass, its order and work on the device, its shape).
    """
    (k, v), (out, lse, partial), (each, order, work, shape) = workspace, results, planned
    tile, mask = shape.tile, params.mask
    head_dim, width = q.shape[2], v.shape[2]
    padded, padded_v = _padded(head_dim), _padded(width)
    sinks = params.sinks is not None and not each.carried
    scale, cap = params.softmax_scale * LOG2E, 0.0
    if params.softcap is not None:
        # exp2(x * 2 log2e) is tanh's; the cap is per log2 from here on.
        scale = 2 * params.softmax_scale / params.softcap * LOG2E
        cap = params.softcap * LOG2E
    rounds, programs = order.shape
    prefill_kernel[(programs,)](
        q,
        _descriptor(k, tile.keys, padded),
        _descriptor(v, tile.keys, padded_v),
        out,
        lse,
        partial if each.carried else lse,
        lse,
        params.sinks if sinks else lse,
        order,
        work,
        rounds,
        each.heads,
        each.head0,
        each.rows,
        q.shape[1],
        q.stride(0),
        q.stride(1),
        scale,
        cap,
        getattr(mask, "window", None) or 0,
        getattr(mask, "sink_tokens", 0),
        shape.sink_tiles,
        max(body_page, 1),
        G=shape.group,
        D=head_dim,
        DV=width,
        BM=tile.rows,
        BN=tile.keys,
        DP=padded,
        DVP=padded_v,
        STAGES=tile.stages,
        CAUSAL=mask.kind == "causal",
        WINDOW=shape.window is not None,
        BODY=body_page > 0,
        SOFTCAP=params.softcap is not None,
        SINKS=sinks,
        CARRY=each.carried,
        SHIFT=8 if k.dtype == torch.float16 else 0,
        PINGPONG=False,
        REVERSE=True,
        num_warps=4,
    )


def _shape(q: Tensor, layer: LayerKV, params: AttendParams) -> DenseShape:
    mask = params.mask
    window = mask.window if isinstance(mask, CausalMask) else None
    return DenseShape(
        kv_heads=layer.kv_heads,
        group=q.shape[1] // layer.kv_heads,
        row_bytes=2 * (layer.key.head_dim + layer.value.head_dim),
        tile=dense_tile(max(_padded(layer.key.head_dim), _padded(layer.value.head_dim))),
        window=window,
        sink_tokens=mask.sink_tokens if isinstance(mask, CausalMask) else 0,
        processors=device_info(q.device).processors,
    )


@lru_cache(maxsize=32)
def _device_passes(
    query_lens: tuple[int, ...], context_lens: tuple[int, ...], shape: DenseShape, device: str
) -> tuple[tuple[DensePass, Tensor, Tensor, Tensor], ...]:
    """The step's passes with their tables on the device: every layer of a step shares them."""
    return tuple(
        (
            each,
            _on_device(each.spans, device),
            _on_device(each.order, device),
            _on_device(each.work, device),
        )
        for each in plan_passes(query_lens, context_lens, shape)
    )


def _on_device(table: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(table).to(device)


def _workspaces(each: DensePass, layer: LayerKV, q: Tensor) -> tuple[Tensor, Tensor]:
    """[heads, rows, head_dim] of K and of V; torch's allocator keeps the memory between layers."""
    dtype = workspace_dtype(layer, q.dtype)
    k = torch.empty(each.heads, each.rows, layer.key.head_dim, dtype=dtype, device=q.device)
    v = torch.empty(each.heads, each.rows, layer.value.head_dim, dtype=dtype, device=q.device)
    return k, v


def _descriptor(rows: Tensor, keys: int, padded: int) -> TensorDescriptor:
    """TMA over all heads' rows; channels past head_dim read as 0."""
    flat = rows.flatten(0, 1)
    layout = gl.NVMMASharedLayout.get_default_for([keys, padded], _GLUON_DTYPES[rows.dtype])
    return TensorDescriptor.from_tensor(flat, [keys, padded], layout)


def _padded(head_dim: int) -> int:
    return max(64, 1 << (head_dim - 1).bit_length())
