"""Attention over latent rows on a GPU: views in, one launch or two, nothing read back.

Launch arguments are host integers that do not depend on the lengths (upper bounds under CUDA
graphs). Who has which tiles, the pieces of rows that were cut and their merge are decode's.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.hardware import E4M3, HOPPER, device_info
from quantpage.masks import FullMask
from quantpage.ops import refusals
from quantpage.ops.attend.decode.launch import chunk_of
from quantpage.ops.attend.decode.triton import paired
from quantpage.ops.attend.decode.triton_cuts import merge_cuts_kernel
from quantpage.ops.attend.decode.workspaces import counters_of, workspace
from quantpage.ops.attend.flash.tiles import portable_width, processors_of
from quantpage.ops.attend.latent.launch import (
    LatentTiles,
    fitted,
    hint_count,
    latent_tiles,
    programs_of,
    row_tiles,
    space,
)
from quantpage.ops.attend.latent.triton_kernel import decode_kernel
from quantpage.ops.attend.params import AttendParams, causal_or_full, reach_of
from quantpage.ops.attend.results import Asked, Results, kernel, results_for
from quantpage.ops.checks import Needs
from quantpage.ops.operand import Operand, operand


@kernel(Needs(refusals.LATENT_TRITON, kind="cuda"))
def attend(
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    asked: Asked,
    tiles: LatentTiles | None = None,
) -> Results:
    """tiles: the launch's shape; None: the planner's choice."""
    results = results_for(q, layer.key.head_dim, True, asked.out, asked.lse)
    if q.shape[0]:
        decode_into(results, q, layer, batch, params, tiles or planned(q, layer, batch))
    return results


def planned(q: Tensor, layer: LayerKV, batch: BatchPlan, hopper: bool = False) -> LatentTiles:
    """The planner's choice, as the device has room for it; hopper: the Hopper kernel can be had."""
    device = device_info(q.device)
    codes = layer.key.spec.quantized and layer.value.spec.quantized
    tiles = latent_tiles(
        codes,
        q.shape[1] * batch.max_query_len,
        sum(batch.host_context_lens),
        device.capability,
        hopper,
    )
    if tiles.wgmma:
        return tiles
    width = sum(_width(half.head_dim) for half in (layer.key, layer.value))
    return fitted(tiles, width, 1 if codes else 2, device.shared_bytes)


JOINED = 4
"""Programs a row up to which the kernel joins pieces itself. With the 4.1 of 64 x 4k a step took
69.7 us so, and 66.9 with a launch that joins."""
JOINS = 1024
"""Programs of the launch that joins, about."""


def _width(channels: int) -> int:
    """Of a tile: a power of two, whose words of four are at least a product's sixteen."""
    return max(64, portable_width(channels))


class Arranged(NamedTuple):
    """A launch with all that both kernels are given."""

    programs: int
    given: tuple[Any, ...]
    """Queries, pages, the step, results and workspaces, numbers, strides."""
    both: dict[str, Any]
    """What is compiled into both kernels and into the launch that joins."""
    row: Operand
    rotary: Operand
    counters: Tensor | None
    """By which the last of a row's programs knows that it joins the pieces; None: ``join`` does."""
    hints: Tensor
    """Where programs keep what they began with, if they do (launch.HINTS)."""
    merge: tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]
    """Grid, arguments and constants of the launch that joins cut rows."""


def arrange(
    results: Results,
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    tiles: LatentTiles,
    slots: int | None = None,
) -> Arranged:
    """What a launch of this shape takes. slots: partial results of a prompt's plan (prompts);
    None: programs share the step's tiles by themselves.
    """
    mask, (out, lse) = causal_or_full(params.mask), results
    heads = q.shape[1]
    q = q if q.stride(-1) == 1 else q.contiguous()
    unit = torch.int32 if tiles.by_keys or tiles.wgmma else None
    row, rotary = operand(layer.key, unit), operand(layer.value, unit)
    processors = processors_of(q.device)
    if slots is None:
        tiles_of_rows = row_tiles(heads, batch.max_query_len, tiles.rows)
        all_rows = batch.num_requests * tiles_of_rows
        programs = slots = programs_of(tiles, processors, all_rows)
    else:
        # Nothing that is compiled into a kernel depends on how long prompts are.
        tiles_of_rows = all_rows = 1
        programs = processors * tiles.programs_per_processor
    hinted = hint_count(tiles, programs)
    part_out, part_lse, numbers = workspace(
        q.device, space(tiles, slots, row.head_dim, hinted + 2 * all_rows)
    )
    cuts = numbers[hinted:] if hinted else numbers
    window, sink_tokens = reach_of(mask)
    mask_numbers = (window or 0, sink_tokens)
    overlap = device_info(q.device).since(HOPPER)
    both: dict[str, Any] = {
        "PAGE": batch.page_size, "ROWS": tiles.rows, "FULL": isinstance(mask, FullMask),
        "WINDOW": window is not None, "SINKS": params.sinks is not None, "OVERLAP": overlap,
        "launch_pdl": overlap,
    }  # fmt: skip
    given = (
        q, row.codes, row.scale, rotary.codes, rotary.scale, batch.page_table, batch.query_starts,
        batch.context_lens, params.sinks, out, lse, part_out, part_lse, cuts, params.softmax_scale,
        params.softcap if params.softcap is not None else 1.0, batch.num_requests, tiles_of_rows,
        tiles.min_tiles, *mask_numbers, q.stride(0), q.stride(1), row.strides[0],
        row.scale_strides[0], rotary.strides[0], rotary.scale_strides[0],
        batch.page_table.stride(0), out.stride(0), out.stride(1),
    )  # fmt: skip
    merged = (
        cuts, part_out, part_lse, batch.query_starts, batch.context_lens, params.sinks, out, lse,
        None, None, 1, tiles_of_rows, *mask_numbers, out.stride(0), out.stride(1),
    )  # fmt: skip
    # Pieces that a row is cut into, which the merge takes at once if they are few.
    parts = min(32, max(4, triton.next_power_of_2(programs // all_rows + 2)))
    fixed = both | {
        "VALUE_DIM": row.head_dim, "GROUP": heads, "SEGMENT": 0, "PARTS": parts, "num_warps": 4
    }  # fmt: skip
    # A program a query row, of many rows each several: most are not cut, and launched for nothing.
    side_by_side = min(tiles.rows, heads * batch.max_query_len, max(8, JOINS // all_rows))
    grid = (all_rows, side_by_side)
    # Of few pieces a program is done before a launch would begin. (64 rows have no registers left.)
    joined = tiles.wgmma and tiles.rows < 64 and programs <= JOINED * all_rows
    counters = counters_of(q.device, all_rows) if joined else None
    return Arranged(programs, given, both, row, rotary, counters, numbers, (grid, merged, fixed))


def join(made: Arranged) -> None:
    """Rows that were cut, by a launch of its own."""
    grid, given, fixed = made.merge
    merge_cuts_kernel[grid](*given, **fixed)


def decode_into(
    results: Results,
    q: Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    tiles: LatentTiles,
) -> None:
    """A step by this shape."""
    if tiles.by_keys and not (layer.key.spec.quantized and layer.value.spec.quantized):
        raise ValueError("tiles: expected queries by keys for pages without codes, got keys first")
    made = arrange(results, q, layer, batch, params, tiles)
    row, rotary = made.row, made.rotary
    decode_kernel[(made.programs,)](
        *made.given,
        **made.both,
        ROW_CODE=row.code,
        ROTARY_CODE=rotary.code,
        ROW_DIM=row.head_dim,
        ROTARY_DIM=rotary.head_dim,
        ROW_WIDTH=_width(row.head_dim),
        ROTARY_WIDTH=_width(rotary.head_dim),
        HEADS=q.shape[1],
        TILE=tiles.tile,
        SOFTCAP=params.softcap is not None,
        CHUNK=chunk_of(batch.num_requests),
        STAGES=tiles.stages,
        PAIRS=paired(layer.key) and paired(layer.value),
        # One query a request: what it does not see is not loaded.
        HIDES=not layer.key.spec.quantized and batch.max_query_len > 1,
        OLD=device_info(q.device).before(E4M3),
        BY_KEYS=tiles.by_keys,
        num_warps=tiles.warps,
    )
    join(made)
