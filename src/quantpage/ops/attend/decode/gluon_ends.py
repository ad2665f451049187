"""How a program ends the rows that it has walked: results of whole rows, pieces of rows that were
cut. What the Hopper kernels of decode share; outputs are given as [rows, channels].
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_rows import store_cut, with_sink
from quantpage.ops.attend.decode.gluon_share import here, row_programs
from quantpage.ops.triton.common import LN2, STATIC


class Ended(NamedTuple):
    """What the outputs of a piece of a row go by."""

    complete: Any
    """Whether it is the whole row."""
    slot_id: Any
    """Else where it is kept."""
    ratio: Any
    """What outputs are multiplied by."""
    total: Any
    """The sum of weights."""


@gluon.jit
def end_sums(
    weights, anchor, rows: gl.constexpr, sum_rows: gl.constexpr, of, part, line, kv_heads, program,
    results, FIXED: gl.constexpr,
):  # fmt: skip
    """Log-sum-exps of a piece of a row are stored, and where the row's pieces are. sum_rows: of
    weights as a kernel has them (gluon_rows). of: the query rows (gluon_records.Rows).
    """
    GROUP: gl.constexpr = FIXED.GROUP
    ROWS: gl.constexpr = FIXED.ROWS
    ROW_TILES: gl.constexpr = FIXED.ROW_TILES
    row = here(of.first) + gl.arange(0, ROWS, rows)
    real = row < of.q_len * GROUP
    token_at = (of.q_start + row // GROUP).to(gl.int64)
    q_head_at = of.head * GROUP + row % GROUP
    if FIXED.PIECES:
        whole = (here(part.first_tile) == 0) & (part.last_tile == part.tiles)
        total, row_lse, ratio = sum_rows(weights, anchor, rows)
        row_id = here(of.request) * kv_heads * ROW_TILES + of.item
        # A program may have many whole rows.
        slot_id = 2 * here(program) + (part.position != line.start).to(gl.int32)
        slot_id = gl.where(whole, 2 * gl.num_programs(0) + row_id, slot_id)
        # Never. Without a branch around what is stored Triton 3.6's lowering fails an assertion.
        complete = whole & (of.q_len < 0)
        if part.first_tile == 0:
            gl.store(results.cuts + row_id * 2, slot_id)
            _, last, _ = row_programs(
                program, part.position, part.row_start, part.tiles, line.share, line.even, part.lead
            )
            gl.store(results.cuts + row_id * 2 + 1, gl.where(whole, slot_id // 2, last))
    else:
        complete = (part.first_tile == 0) & (part.last_tile == part.tiles)
        total, row_lse, ratio = sum_rows(weights, anchor, rows)
        slot_id = 2 * program + (part.position != line.start).to(gl.int32)
        if part.first_tile == 0:
            cut = results.cuts + (of.request * kv_heads * ROW_TILES + of.item) * 2
            store_cut(
                cut, complete, slot_id, program, part.position, part.tiles, line.share, line.even,
                part.row_start, part.lead,
            )  # fmt: skip
    if complete:
        if FIXED.SINKS:
            row_lse, ratio = with_sink(row_lse, ratio, results.sinks, q_head_at, real)
        if results.lse is not None:
            at = results.lse + token_at * (kv_heads * GROUP) + q_head_at
            gl.store(at, row_lse * LN2, mask=real)
    else:
        piece = slot_id.to(gl.int64) * ROWS + gl.arange(0, ROWS, rows)
        gl.store(results.part_lse + piece, row_lse, mask=real)
    return Ended(complete, slot_id, ratio, total)


@gluon.jit
def end_outputs(o, mass, ended, of, channels, results, FIXED: gl.constexpr):
    """Outputs, multiplied by their ratio, to the result or to a piece. mass: what the sink left of
    each row's weight: 1 without one, 0 for a row that saw nothing.
    """
    GROUP: gl.constexpr = FIXED.GROUP
    ROWS: gl.constexpr = o.shape[0]
    VALUE_DIM: gl.constexpr = o.shape[1]
    out_layout: gl.constexpr = o.type.layout
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    out_channel = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, out_layout))
    if FIXED.V_SCALES == STATIC:
        static_at = of.head * channels.v_head + out_channel // FIXED.V_SHARED
        o = o * gl.load(channels.v_scale + static_at).to(gl.float32)[None, :]
        if FIXED.V_ZERO:
            o += (
                gl.convert_layout(mass, out_rows)[:, None]
                * gl.load(channels.v_zero + static_at).to(gl.float32)[None, :]
            )
    nth = gl.arange(0, ROWS, out_rows)
    out_row = of.first + nth
    keep = (out_row < of.q_len * GROUP)[:, None]
    if ended.complete:
        out_at = (of.q_start + out_row // GROUP).to(gl.int64) * results.out_token
        out_at += (of.head * GROUP + out_row % GROUP) * results.out_head
        out_at = out_at[:, None] + out_channel[None, :]
        gl.store(results.out + out_at, o.to(results.out.dtype.element_ty), mask=keep)
    else:
        part_at = (ended.slot_id.to(gl.int64) * ROWS + nth) * VALUE_DIM
        gl.store(results.part_out + part_at[:, None] + out_channel[None, :], o, mask=keep)
