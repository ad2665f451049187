"""Prefill on Hopper: pages to a dense 16-bit workspace, then warp-specialised attention over it.

Dequantizing a key once for a whole chunk, instead of once a query tile, leaves the tensor cores the
only limit: the gather costs about 300 / (chunk tokens * group) of the attention. The workspace
holds what the cache holds, the chunk's own keys and values too, so that results do not depend on
how a prompt was cut.

Numbers of a quantized cache are kept in float16: codes are exact in it and scale times code rounds
to 11 bits (bfloat16: 8). An unquantized cache keeps its dtype.

Exact pages are few keys a query: that segment goes to the portable kernel, as do requests with too
few rows to be worth a workspace (prefill/ways).
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental.gluon import language as gl

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.masks import CausalMask, FullMask
from quantpage.ops import refusals
from quantpage.ops.attend.decode.gluon import attend as decode
from quantpage.ops.attend.decode.triton import attend as triton_decode
from quantpage.ops.attend.params import AttendParams, Segment
from quantpage.ops.attend.prefill import triton as triton_prefill
from quantpage.ops.attend.prefill.gluon_kernel import prefill_kernel
from quantpage.ops.attend.prefill.plan import DensePass, DenseShape, DenseTile, plan_passes
from quantpage.ops.attend.prefill.ways import choose_ways
from quantpage.ops.checks import Needs, attends, serves, unchecked
from quantpage.ops.operand import Operand, given_values
from quantpage.ops.triton.gluon_compat import TensorDescriptor

_GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def dense_tile(head_dim: int) -> DenseTile:
    """The tile for a padded head_dim; each fits 227 KB of shared memory and 240 registers."""
    if head_dim <= 128:
        return DenseTile(rows=128, keys=128, stages=2)
    return DenseTile(rows=128, keys=64, stages=2)


@attends(Needs(refusals.PREFILL_GLUON, kind="cuda", phase="prefill"))
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
    if segment == "exact" or (segment == "body" and params.mask.kind == "full"):
        return unchecked(triton_prefill.attend)(q, layer, batch, params, segment)
    out, lse = triton_prefill.empty_results(q, layer, segment)
    q = q if q.stride(-1) == 1 else q.contiguous()
    # Decode's Hopper kernel hands on what it does not take, so that Triton's says what is served.
    decodes = segment == "all" and serves(triton_decode, q, layer, "decode", params.mask.kind)
    ways = choose_ways(batch.query_lens, q.shape[1] // layer.kv_heads, "gluon", decodes)
    if ways.workspace != ():
        _attend_workspace((out, lse), q, layer, batch, params, segment, ways.workspace)
    triton_prefill.decode_rows((out, lse), q, layer, batch, params, ways.decode, decode)
    triton_prefill.attend_pages((out, lse), q, layer, batch, params, segment, ways.pages)
    return out, lse


def _attend_workspace(results, q, layer, batch, params, segment, members) -> None:
    (out, lse), (tokens, q_heads, _) = results, q.shape
    shape = workspace_shape(q, layer, params)
    body_page = batch.page_size if segment == "body" else 0
    lens = (batch.query_lens, batch.host_context_lens)
    carried = None
    values = given_values(layer)
    for each, spans, order, items in _device_passes(*lens, shape, members, str(q.device)):
        dtype = triton_prefill.workspace_dtype(layer, q.dtype)
        k, v = triton_prefill.fill_workspace(each, spans, layer, batch.page_table, dtype)
        planned = (each, order, items, shape)
        if each.work.parts > 1:
            parts = (each.work.parts, tokens, q_heads)
            part_out = torch.empty(*parts, v.shape[2], dtype=torch.float32, device=q.device)
            part_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
            launch(q, (k, v), (part_out, part_lse, None), params, planned, body_page, values)
            triton_prefill.merge_parts(part_out, part_lse, params.sinks, results)
            continue
        if carried is None and not each.final:
            carried = torch.empty(out.shape, dtype=torch.float32, device=q.device)
        target = out if each.final else carried
        launch(q, (k, v), (target, lse, carried), params, planned, body_page, values)


def launch(
    q, workspace, results, params: AttendParams, planned, body_page: int = 0,
    values: Operand | None = None,
) -> None:  # fmt: skip
    """One pass: queries against the filled workspace.

    values: whose scales are given, so that the workspace holds their codes; None: numbers.
    results: (out, lse, float32 partials that carried rows start from).
    planned: (the pass, its order and items on the device, its shape).
    """
    (k, v), (out, lse, carried), (each, order, items, shape) = workspace, results, planned
    tile, mask = shape.tile, params.mask
    head_dim, width = q.shape[2], v.shape[2]
    padded, padded_v = padded_width(head_dim), padded_width(width)
    # A sink logit enters a row once: in the first pass, or when parts are merged.
    sinks = params.sinks is not None and not each.carried and each.work.parts == 1
    scale, cap = triton_prefill.exponent_scale(params)
    rounds, programs = order.shape
    prefill_kernel[(programs,)](
        q,
        descriptor(k, tile.keys, padded),
        descriptor(v, tile.keys, padded_v),
        out,
        lse,
        carried if each.carried else lse,
        lse,
        params.sinks if sinks else lse,
        lse if values is None else values.scale,
        lse if values is None else values.zero,
        0 if values is None else values.scale_strides[1],
        order,
        items,
        rounds,
        each.heads,
        each.head0,
        each.rows,
        q.shape[0] * q.shape[1],
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
        V_STATIC=values is not None,
        V_ZERO=values is not None and values.has_zero,
        V_GROUPS=1 if values is None else values.groups,
        num_warps=4,
    )


def workspace_shape(q: Tensor, layer: LayerKV, params: AttendParams) -> DenseShape:
    """What the plan needs to know of this call."""
    mask = params.mask
    return DenseShape(
        kv_heads=layer.kv_heads,
        group=q.shape[1] // layer.kv_heads,
        row_bytes=2 * (layer.key.head_dim + layer.value.head_dim),
        tile=dense_tile(max(padded_width(layer.key.head_dim), padded_width(layer.value.head_dim))),
        window=mask.window if isinstance(mask, CausalMask) else None,
        sink_tokens=mask.sink_tokens if isinstance(mask, CausalMask) else 0,
        processors=device_info(q.device).processors,
    )


@lru_cache(maxsize=32)
def _device_passes(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    shape: DenseShape,
    members: tuple[int, ...] | None,
    device: str,
) -> tuple[tuple[DensePass, Tensor, Tensor, Tensor], ...]:
    """The step's passes with their tables on the device: every layer of a step shares them."""
    return tuple(
        (
            each,
            torch.from_numpy(each.spans).to(device),
            torch.from_numpy(each.work.order).to(device),
            torch.from_numpy(each.work.items).to(device),
        )
        for each in plan_passes(query_lens, context_lens, shape, members)
    )


def descriptor(rows: Tensor, keys: int, padded: int) -> TensorDescriptor:
    """TMA over all heads' rows; channels past head_dim read as 0."""
    flat = rows.flatten(0, 1)
    layout = gl.NVMMASharedLayout.get_default_for([keys, padded], _GLUON_DTYPES[rows.dtype])
    return TensorDescriptor.from_tensor(flat, [keys, padded], layout)


def padded_width(head_dim: int) -> int:
    """Channels of a tile: wgmma and the swizzle want at least 64."""
    return max(64, 1 << (head_dim - 1).bit_length())
