"""The decode path's host side: views in, one launch or two, nothing read back.

Launch arguments are host integers that do not depend on the lengths (upper bounds under CUDA
graphs). What both kernels are given stands here (``arrange``); decode/gluon launches the other.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats.rotate import rotation_block
from quantpage.hardware import E4M3, HOPPER, device_info
from quantpage.masks import FullMask
from quantpage.ops import refusals
from quantpage.ops.attend.decode.launch import (
    EXACT_ROWS,
    EXACT_TILES,
    MAX_ROWS,
    DecodeTiles,
    chunk_of,
    decode_tiles,
    fitted,
    join_shape,
    programs_of,
    row_tiles,
)
from quantpage.ops.attend.decode.triton_cuts import merge_cuts_kernel
from quantpage.ops.attend.decode.triton_kernel import decode_kernel
from quantpage.ops.attend.decode.workspaces import (
    counter_count,
    counters_of,
    piece_sizes,
    workspace,
)
from quantpage.ops.attend.flash.tiles import processors_of
from quantpage.ops.attend.params import (
    SEGMENTS,
    AttendParams,
    Segment,
    causal_or_full,
    reach_of,
)
from quantpage.ops.attend.results import Asked, Results, kernel, results_for
from quantpage.ops.checks import Needs
from quantpage.ops.operand import STATIC, Operand, operand

# In what the Hopper kernel reads codes, where it is not words.
KEY_UNITS = {"int8": torch.int8, "int4": torch.int8}
VALUE_UNITS = {"int4": torch.int16}

OVERLAP = True
"""Programmatic dependent launch where the device has it: the merge is set up while decode runs."""


def decoder(needs: Needs, into: Callable[..., object]) -> Callable[..., Results]:
    """The entry of a kernel of decode.

    into: (results, q, layer, batch, params, options). The plan may have some of the requests of
    ``q`` alone, with rows counted from its first: other rows are left as they are.
    """

    def attend(
        q: Tensor, layer: LayerKV, batch: BatchPlan, params: AttendParams, asked: Asked, **more: Any
    ) -> Results:
        options = Options(asked.segment, **more)
        results = results_for(q, layer.value.head_dim, options.final, asked.out, asked.lse)
        into(results, q, layer, batch, params, options)
        return results

    attend.__module__ = into.__module__
    return kernel(needs)(attend)


def join_cuts(made: "Arranged") -> None:
    """Rows that were cut, joined by triton_cuts."""
    grid, given, fixed = made.merge
    merge_cuts_kernel[grid](*given, **fixed)


class Options(NamedTuple):
    """What a call to decode takes besides."""

    segment: Segment = "all"
    tiles: DecodeTiles | None = None
    """The launch's shape; None: the planner's choice."""
    earlier: Results | None = None
    """The exact pages' result, contiguous, that the body's pieces are joined with: by the caller,
    when it has launched what makes it."""
    beside: bool = False
    """Whether it reads nothing of the launch before on this stream, beside which it runs."""
    turned: bool = False
    """Whether whoever joins the pieces turns a result back to the model's basis; of exact pages,
    which always join."""
    join: Callable[["Arranged"], None] = join_cuts
    """Launches what joins rows that were cut."""

    @property
    def final(self) -> bool:
        """Whether the result is the whole's."""
        return self.segment == "all" or self.earlier is not None


WHOLE = Options()


def decode_into(
    results: Results, q, layer, batch, params, options: Options = WHOLE
) -> "Arranged | None":
    """As ``decoder`` says. Returns what is left to join where other keys' result enters."""
    if layer.exact_key is not None:
        with_exact(decode_into, results, q, layer, batch, params, options)
        return None
    tiles = options.tiles
    if tiles is None:
        tiles = planned(q, layer, batch, params, options.segment)
    made = arrange(results, q, layer, batch, params, options._replace(tiles=tiles))
    if made.programs:
        decode_kernel[(made.programs,)](
            *made.given,
            *made.places,
            **made.fixed,
            OLD=device_info(q.device).before(E4M3),
            PAIRS=paired(layer.key) and paired(layer.value),
            BESIDE=made.beside,
            GATHER=tiles.gather,
            WHOLE=tiles.whole,
            # One query a request: what it does not see is not loaded.
            HIDES=not layer.value.spec.quantized and batch.max_query_len > 1,
        )
        if options.earlier is None and not (tiles.gather or tiles.whole):
            made.join(made)
    return made


def with_exact(
    into: Callable[..., "Arranged | None"],
    results: Results,
    q,
    layer,
    batch,
    params,
    options: Options,
    hopper: bool = False,
) -> None:
    """Body and exact pages, in launches beside each other, and one that joins both: the second is
    short and reads whole rows.

    into: whose body. hopper: as ``planned`` says.
    """
    body, bare = layer.body(), replace(params, sinks=None)
    other = results_for(q, layer.value.head_dim, final=False)
    tiles = replace(planned(q, body, batch, params, "body", hopper), gather=0)
    joined = Options("body", tiles, earlier=other, turned=options.turned)
    made = into(results, q, body, batch, params, joined)
    into(other, q, layer.exact(), batch.exact_step(), bare, Options("exact", beside=True))
    if made is not None and made.programs:
        made.join(made)


def planned(
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    segment: Segment,
    hopper: bool = False,
) -> DecodeTiles:
    """The planner's choice; hopper: the Hopper kernels can be had."""
    group = q.shape[1] // layer.kv_heads
    exact = segment == "exact"
    if exact and hopper and in_exact_boxes(q, layer) and group * batch.max_query_len > EXACT_ROWS:
        return EXACT_TILES
    most = EXACT_ROWS if exact else MAX_ROWS
    rows, tiles_of_rows = row_tiles(group, batch.max_query_len, most=most)
    width = max(q.shape[2], layer.value.head_dim)
    hopper = hopper and not exact
    tiles = decode_tiles(
        layer.key.spec,
        layer.value.spec,
        width,
        rows,
        layer.kv_heads * sum(_seen_lengths(batch, params)),
        batch.num_requests * layer.kv_heads * tiles_of_rows,
        hopper,
        hopper and in_boxes(layer),
    )
    if not layer.key.spec.quantized:
        limit = device_info(q.device).shared_bytes
        tiles = fitted(tiles, rows, width, layer.key.codes.element_size(), limit)
    # Of exact pages three a query: a program reads them all.
    return replace(tiles, whole=True, gather=0, rows=(8, EXACT_ROWS)) if exact else tiles


def _seen_lengths(batch: BatchPlan, params: AttendParams) -> tuple[int, ...]:
    """Keys that each request's queries see at most."""
    window, sink_tokens = reach_of(params.mask)
    if window is None:
        return batch.host_context_lens
    most = window + sink_tokens + batch.max_query_len
    return tuple(min(context, most) for context in batch.host_context_lens)


def in_boxes(layer: LayerKV) -> bool:
    """Whether TMA can copy what a tile of 64 keys has: codes, and a scale and a zero a token."""
    halves = layer.key, layer.value
    given = [p for half in halves if half.spec.dynamic for p in (half.scale, half.zero)]
    planes = [plane for plane in given if plane is not None]
    copied = [half.codes for half in halves] + planes
    numbers = [each.data_ptr() for each in copied]
    numbers += [n * each.element_size() for each in copied for n in each.stride()[:2]]
    one = all(plane.shape[-1] == 1 for plane in planes)
    return not layer.page_size % 64 and one and not any(n % 16 for n in numbers)


def in_exact_boxes(q: Tensor, layer: LayerKV) -> bool:
    """Whether gluon_exact reads these pages."""
    if layer.key.spec.quantized or layer.value.spec.quantized or q.shape[-1] != 128:
        return False
    narrow = all(half.codes.element_size() == 2 for half in (layer.key, layer.value))
    return narrow and in_boxes(layer)


class Arranged(NamedTuple):
    """A launch with all that both kernels are given."""

    programs: int
    """0: nothing is to be done."""
    given: tuple[Tensor | None, ...]
    """Queries, pages and the step."""
    places: tuple[Any, ...]
    """Results and workspaces, numbers, strides."""
    fixed: dict[str, Any]
    """What is compiled in."""
    beside: bool
    """Whether it runs beside the launch before: its last program waits for that, at its end."""
    halves: tuple[Operand, ...]
    """K and V, of which ``given`` has the codes."""
    merge: tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]
    """Grid, arguments and constants of ``join_cuts``'s launch."""
    seen_lengths: Callable[[], tuple[int, ...]]
    """Keys that each request's queries see at most; of a call, as most launches do not ask."""
    join: Callable[["Arranged"], None] = join_cuts
    """As of ``Options``."""


def arrange(
    results: Results,
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    options: Options,
) -> Arranged:
    """options: with tiles."""
    mask, (segment, tiles, earlier, beside, turned, join) = causal_or_full(params.mask), options
    assert tiles is not None
    tokens, q_heads, width = q.shape
    kv_heads, value_width = layer.kv_heads, layer.value.head_dim
    group = q_heads // kv_heads
    out, lse = results
    if tokens == 0:
        return Arranged(0, (), (), {}, False, (), ((0, 0), (), {}), tuple)
    rows, tiles_of_rows = row_tiles(group, batch.max_query_len, *tiles.rows)
    all_rows = batch.num_requests * kv_heads * tiles_of_rows
    processors = processors_of(q.device)
    programs = programs_of(tiles, processors, all_rows)
    cutting = 0 if tiles.whole else programs
    part_out, part_lse, cuts = workspace(
        q.device, piece_sizes(cutting, rows, value_width, all_rows, earlier is not None)
    )
    if tiles.gather:
        cuts = counters_of(q.device, counter_count(programs, all_rows, tiles.gather))
    window, sink_tokens = reach_of(mask)
    mask_numbers = (window or 0, sink_tokens)
    overlap = OVERLAP and device_info(q.device).since(HOPPER)
    # Before queries that are copied now there is nothing to run beside.
    beside = overlap and beside and q.stride(-1) == 1
    q = q if q.stride(-1) == 1 else q.contiguous()
    key_units, value_units = (KEY_UNITS, VALUE_UNITS) if tiles.wgmma else ({}, {})
    if tiles.drafts:
        k, v = operand(layer.key), operand(layer.value)
    else:
        k = operand(layer.key, key_units.get(layer.key.spec.code.name, _unit(layer.key)))
        v = operand(layer.value, value_units.get(layer.value.spec.code.name, _unit(layer.value)))
    sinks = params.sinks if options.final else None
    given = (
        q, k.codes, v.codes, k.scale, v.scale, k.zero, v.zero, batch.page_table,
        batch.query_starts, batch.context_lens, sinks,
    )  # fmt: skip
    places = (
        out, lse, part_out, part_lse, cuts, params.softmax_scale,
        params.softcap if params.softcap is not None else 1.0, batch.num_requests, kv_heads,
        tiles.min_tiles, *mask_numbers, q.stride(0), q.stride(1), *k.strides, *v.strides,
        *k.scale_strides, *v.scale_strides, batch.page_table.stride(0),
        out.stride(0), out.stride(1),
    )  # fmt: skip
    # What the launch that joins is compiled for, too.
    both = {
        "VALUE_DIM": value_width, "GROUP": group, "PAGE": batch.page_size, "ROWS": rows,
        "FULL": isinstance(mask, FullMask), "WINDOW": window is not None,
        "SEGMENT": SEGMENTS[segment], "SINKS": sinks is not None, "OVERLAP": overlap,
        "launch_pdl": overlap,
    }  # fmt: skip
    fixed = both | {
        "ROW_TILES": tiles_of_rows,
        "K_CODE": k.code, "K_SCALES": k.scales, "K_ZERO": k.has_zero, "K_SHARED": _shared(k),
        "V_CODE": v.code, "V_SCALES": v.scales, "V_ZERO": v.has_zero, "V_SHARED": _shared(v),
        "HEAD_DIM": width, "TILE": tiles.tile, "SOFTCAP": params.softcap is not None,
        "CHUNK": chunk_of(batch.num_requests, tiles.wgmma), "STAGES": tiles.stages,
        "num_warps": tiles.warps, "maxnreg": tiles.registers, "PIECES": earlier is not None,
    }  # fmt: skip
    parts, warps = join_shape(programs, all_rows, value_width)
    merged = (
        cuts, part_out, part_lse, batch.query_starts, batch.context_lens, sinks, out, lse,
        *(earlier or (None, None)), kv_heads, tiles_of_rows, *mask_numbers, out.stride(0),
        out.stride(1),
    )  # fmt: skip
    # A program a query row.
    grid = (all_rows, min(rows, group * batch.max_query_len))
    turn = rotation_block(value_width) if turned else 0
    one = tiles.wgmma and batch.num_requests == 1
    joining = {
        "PARTS": parts, "TURN": turn, "num_warps": warps, "programs": programs,
        "min_tiles": tiles.min_tiles, "ONE": tiles.tile if one else 0,
    }  # fmt: skip
    merge = (grid, merged, both | joining)
    seen = partial(_seen_lengths, batch, params)
    return Arranged(programs, given, places, fixed, beside, (k, v), merge, seen, join)


def _shared(half: Operand) -> int:
    """Channels that share a static scale."""
    return half.shared if half.scales == STATIC else 1


def _unit(pages: QuantizedPages) -> torch.dtype:
    """In what the Triton kernel reads codes."""
    return torch.int16 if pages.spec.code.fields else torch.int32


def paired(pages: QuantizedPages) -> bool:
    """Whether the planes of two neighbouring tokens are one aligned 32-bit word."""
    planes = [p for p in (pages.scale, pages.zero) if p is not None and pages.spec.dynamic]
    return all(
        p.dtype == torch.float16
        and p.data_ptr() % 4 == 0
        and p.stride(0) % 2 == 0
        and p.stride(1) % 2 == 0
        for p in planes
    )


attend = decoder(Needs(refusals.DECODE_TRITON, kind="cuda"), decode_into)
