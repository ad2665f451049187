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

from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.ops import refusals
from quantpage.ops.attend.decode.gluon import decode_into
from quantpage.ops.attend.decode.triton import attend as triton_decode
from quantpage.ops.attend.flash.gluon_launch import compiled, descriptor, value_scales
from quantpage.ops.attend.flash.tiles import hopper_tile
from quantpage.ops.attend.flash.triton_launch import parts_for, workspace_dtype
from quantpage.ops.attend.params import AttendParams, exponent_scale, reach_of
from quantpage.ops.attend.prefill import triton as triton_prefill
from quantpage.ops.attend.prefill.gluon_kernel import prefill_kernel
from quantpage.ops.attend.prefill.plan import DensePass, DenseShape, plan_passes
from quantpage.ops.attend.prefill.triton_workspace import fill_workspace, merge_parts, on_device
from quantpage.ops.attend.prefill.ways import Launches, attend_by_ways
from quantpage.ops.attend.results import Asked, Results, kernel, results_for
from quantpage.ops.checks import Needs
from quantpage.ops.operand import Operand, given_values


@kernel(Needs(refusals.PREFILL_GLUON, kind="cuda", phase="prefill"))
def attend(
    q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, asked: Asked
) -> Results:
    """As prefill/triton.attend."""
    segment = asked.segment
    portable = segment == "exact" or (segment == "body" and params.mask.kind == "full")
    by = triton_prefill.LAUNCHES if portable else LAUNCHES
    return attend_by_ways(q, layer, batch, params, by, asked)


def _attend_workspace(results: Results, q, layer, batch, params, segment, members) -> None:
    shape = workspace_shape(q, layer, params)
    body_page = batch.page_size if segment == "body" else 0
    lens = (batch.query_lens, batch.host_context_lens)
    passes = _device_passes(*lens, shape, members, str(q.device))
    dtype, values = workspace_dtype(layer), given_values(layer)
    carried = None
    if any(each.carried for each, *_ in passes):
        # Between passes rows wait as float32 with their log-sum-exp, asked for or not.
        partial = results_for(q, layer.value.head_dim, False)
        carried = partial.out
        if results.lse is None:
            results = Results(results.out, partial.lse)
    for each, spans, order, items in passes:
        workspace = fill_workspace(each, spans, layer, batch.page_table, dtype)
        planned = (each, order, items, shape)
        if each.work.parts > 1:
            parts = parts_for(results, each.work.parts)
            launch(q, workspace, (*parts, None), params, planned, body_page, values)
            merge_parts(parts, params.sinks, results)
            continue
        target = results.out if each.final or carried is None else carried
        launch(q, workspace, (target, results.lse, carried), params, planned, body_page, values)


def launch(
    q: Tensor,
    workspace: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor | None, Tensor | None],
    params: AttendParams,
    planned: tuple[DensePass, Tensor, Tensor, DenseShape],
    body_page: int = 0,
    values: Operand | None = None,
) -> None:
    """One pass: queries against the filled workspace.

    results: out, log-sum-exp, and the float32 partials that carried rows start from. planned: the
    pass, its order and items on the device, its shape. body_page: the page size where only the body
    is asked for, else 0. values: whose scales are given, so that the workspace holds their codes;
    None: numbers.
    """
    (k, v), (out, lse, carried), (each, order, items, shape) = workspace, results, planned
    tile, mask = shape.tile, params.mask
    # A sink logit enters a row once: in the first pass, or when parts are merged.
    sinks = params.sinks is not None and not each.carried and each.work.parts == 1
    scale, cap = exponent_scale(params)
    given_scales, scaled = value_scales(values)
    rounds, programs = order.shape
    prefill_kernel[(programs,)](
        q,
        descriptor(k, tile.keys),
        descriptor(v, tile.keys),
        out,
        lse,
        carried if each.carried else None,
        lse,
        params.sinks if sinks else None,
        *given_scales,
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
        shape.window or 0,
        shape.sink_tokens,
        shape.sink_tiles,
        max(body_page, 1),
        CAUSAL=mask.kind == "causal",
        WINDOW=shape.window is not None,
        BODY=body_page > 0,
        SOFTCAP=params.softcap is not None,
        SINKS=sinks,
        CARRY=each.carried,
        **compiled(q, k, v, shape.group, tile),
        **scaled,
        num_warps=4,
    )


def workspace_shape(q: Tensor, layer: LayerKV, params: AttendParams) -> DenseShape:
    """What the plan needs to know of this call."""
    window, sink_tokens = reach_of(params.mask)
    return DenseShape(
        kv_heads=layer.kv_heads,
        group=q.shape[1] // layer.kv_heads,
        row_bytes=2 * (layer.key.head_dim + layer.value.head_dim),
        tile=hopper_tile(layer.key.head_dim, layer.value.head_dim),
        window=window,
        sink_tokens=sink_tokens,
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
            on_device(each.spans, device),
            on_device(each.work.order, device),
            on_device(each.work.items, device),
        )
        for each in plan_passes(query_lens, context_lens, shape, members)
    )


LAUNCHES = Launches(
    "gluon",
    _attend_workspace,
    triton_prefill.attend_pages,
    decode_into,
    # Decode's Hopper kernel hands on what it does not take, so that Triton's says what is served.
    triton_decode,
)
