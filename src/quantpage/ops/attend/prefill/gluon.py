"""Prefill on Hopper: pages to a dense 16-bit workspace, then warp-specialised attention over it.

Dequantizing a key once for a whole chunk, instead of once a query tile, leaves the tensor cores the
only limit: the gather costs about 300 / (chunk tokens * group) of the attention. The workspace
holds what the cache holds, the chunk's own keys and values too, so that results do not depend on
how a prompt was cut.

Numbers of a quantized cache are kept in float16: codes are exact in it and scale times code rounds
to 11 bits (bfloat16: 8). An unquantized cache keeps its dtype.

Exact pages go into the same workspace and are walked with the codes' numbers; they are float16
there as all is, so that numbers beyond 65,504 saturate. Where requests have too few rows to be
worth a workspace (prefill/ways), under a full mask, and where values in the workspace are codes,
they are a call of the portable kernel and a merge.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import device_info
from quantpage.ops import refusals
from quantpage.ops.attend.decode.gluon import decode_into
from quantpage.ops.attend.decode.triton import attend as triton_decode
from quantpage.ops.attend.flash.gluon_launch import (
    compiled,
    descriptor,
    query_tiles,
    value_scales,
)
from quantpage.ops.attend.flash.tiles import hopper_tile
from quantpage.ops.attend.flash.triton_launch import parts_for, workspace_dtype
from quantpage.ops.attend.flash.triton_merge import merge_partials
from quantpage.ops.attend.params import AttendParams, exponent_scale, reach_of
from quantpage.ops.attend.prefill import triton as triton_prefill
from quantpage.ops.attend.prefill.gluon_kernel import prefill_kernel
from quantpage.ops.attend.prefill.plan import DensePass, DenseShape, ExactRows, plan_passes
from quantpage.ops.attend.prefill.triton_workspace import fill_workspace, merge_parts, on_device
from quantpage.ops.attend.prefill.ways import WORKSPACE_ROWS, Launches, attend_by_ways
from quantpage.ops.attend.results import Asked, Results, contiguous, kernel, results_for
from quantpage.ops.checks import Needs
from quantpage.ops.gather.triton import gather_layer
from quantpage.ops.operand import Operand, given_values


@kernel(Needs(refusals.PREFILL_GLUON, kind="cuda", phase="prefill"))
def attend(
    q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, asked: Asked
) -> Results:
    """As prefill/triton.attend, and a layer with exact pages whole."""
    if layer.exact_key is None:
        return _attend_segment(q, layer, batch, params, asked)
    prompts = sum(new > 0 for new in batch.query_lens)
    rows = batch.num_tokens * q.shape[1] // layer.kv_heads
    # All together, or those of many rows would pay for the merge of those of few.
    dense = prompts and rows >= prompts * WORKSPACE_ROWS["gluon"] and params.mask.kind == "causal"
    if not dense or given_values(layer) is not None:
        return _attend_segments(q, layer, batch, params, asked)
    out = contiguous(asked.out)
    results = results_for(q, layer.value.head_dim, True, out, asked.lse)
    q = q if q.stride(-1) == 1 else q.contiguous()
    _attend_workspace(results, q, layer, batch, params, "all", None)
    return results


def _attend_segment(
    q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, asked: Asked
) -> Results:
    segment = asked.segment
    portable = segment == "exact" or (segment == "body" and params.mask.kind == "full")
    by = triton_prefill.LAUNCHES if portable else LAUNCHES
    return attend_by_ways(q, layer, batch, params, by, asked)


def _attend_segments(
    q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, asked: Asked
) -> Results:
    """Body and exact pages, each by a call, and their merge."""
    # The sink is one key of the softmax: it enters once.
    bare, near = replace(params, sinks=None), batch.exact_step()
    body = _attend_segment(q, layer.body(), batch, bare, Asked("body"))
    exact = _attend_segment(q, layer.exact(), near, bare, Asked("exact"))
    assert body.lse is not None and exact.lse is not None
    width = layer.value.head_dim
    results = results_for(q, width, True, contiguous(asked.out), asked.lse)
    outs, lses = [body.out, exact.out], [body.lse, exact.lse]
    merge_partials(outs, lses, params.sinks, results.out, results.lse)
    return results


def _attend_workspace(results: Results, q, layer, batch, params, segment, members) -> None:
    """segment: "all" of a layer with exact pages puts these into the workspace too."""
    shape = workspace_shape(q, layer, params)
    lens = (batch.query_lens, batch.host_context_lens)
    passes = _device_passes(*lens, shape, members, str(q.device))
    dtype, values = workspace_dtype(layer), given_values(layer)
    body_page = batch.page_size if segment == "body" else 0
    carried = None
    if any(each.carried for each, *_ in passes):
        # Between passes rows wait as float32 with their log-sum-exp, asked for or not.
        partial = results_for(q, layer.value.head_dim, False)
        carried = partial.out
        if results.lse is None:
            results = Results(results.out, partial.lse)
    for each, spans, order, items, exact in passes:
        workspace = fill_workspace(each, spans, layer, batch.page_table, dtype)
        if exact is not None:
            assert each.exact is not None
            table, most = batch.exact_step().page_table, each.exact.max_span
            gather_layer(layer.exact(), table, exact.spans, most, workspace, each.head0)
        planned = Planned(each, order, items, shape, None if exact is None else exact.near)
        if each.work.parts > 1:
            parts = parts_for(results, each.work.parts)
            launch(q, workspace, (*parts, None), params, planned, body_page, values)
            merge_parts(parts, params.sinks, results)
            continue
        target = results.out if each.final or carried is None else carried
        launch(q, workspace, (target, results.lse, carried), params, planned, body_page, values)


class Planned(NamedTuple):
    """One pass, and its tables on the device."""

    work: DensePass
    order: Tensor
    items: Tensor
    shape: DenseShape
    near: Tensor | None = None
    """plan.ExactRows.near."""


def launch(
    q: Tensor,
    workspace: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor | None, Tensor | None],
    params: AttendParams,
    planned: Planned,
    body_page: int = 0,
    values: Operand | None = None,
) -> None:
    """One pass: queries against the filled workspace.

    results: out, log-sum-exp, and the float32 partials that carried rows start from. body_page: the
    page size where codes serve the body alone, else 0. values: whose scales are given, so that the
    workspace holds their codes; None: numbers.
    """
    (k, v), (out, lse, carried), (each, order, items, shape, near) = workspace, results, planned
    tile, mask = shape.tile, params.mask
    # A sink logit enters a row once: in the first pass, or when parts are merged.
    sinks = params.sinks is not None and not each.carried and each.work.parts == 1
    scale, cap = exponent_scale(params)
    given_scales, scaled = value_scales(values)
    rounds, programs = order.shape
    prefill_kernel[(programs,)](
        q,
        # Beside near pages its registers would be parked.
        None if near is not None else query_tiles(q, shape.group, tile),
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
        near,
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
        max(body_page, shape.exact_page, 1),
        CAUSAL=mask.kind == "causal",
        WINDOW=shape.window is not None,
        BODY=body_page > 0,
        SOFTCAP=params.softcap is not None,
        SINKS=sinks,
        CARRY=each.carried,
        EXACT=shape.exact_page > 0,
        NEAR=near is not None,
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
        exact_page=0 if layer.exact_key is None else layer.key.page_size,
    )


@lru_cache(maxsize=32)
def _device_passes(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    shape: DenseShape,
    members: tuple[int, ...] | None,
    device: str,
) -> tuple[tuple[DensePass, Tensor, Tensor, Tensor, "_OnDevice | None"], ...]:
    """The step's passes with their tables on the device: every layer of a step shares them."""
    return tuple(
        (
            each,
            on_device(each.spans, device),
            on_device(each.work.order, device),
            on_device(each.work.items, device),
            None if each.exact is None else _OnDevice.of(each.exact, device),
        )
        for each in plan_passes(query_lens, context_lens, shape, members)
    )


class _OnDevice(NamedTuple):
    """Tables of plan.ExactRows."""

    spans: Tensor
    near: Tensor | None

    @classmethod
    def of(cls, given: ExactRows, device: str) -> "_OnDevice":
        near = None if given.near is None else on_device(given.near, device)
        return cls(on_device(given.spans, device), near)


LAUNCHES = Launches(
    "gluon",
    _attend_workspace,
    triton_prefill.attend_pages,
    decode_into,
    # Decode's Hopper kernel hands on what it does not take, so that Triton's says what is served.
    triton_decode,
)
