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
    weights, anchor, rows: gl.constexpr, sum_rows: gl.constexpr, row_first, q_start, q_len, head,
    kv_heads, first_tile, last_tile, tiles, program, position, start, request, item, share, even,
    cuts, sinks, lse, part_lse, GROUP: gl.constexpr, ROWS: gl.constexpr, ROW_TILES: gl.constexpr,
    SINKS: gl.constexpr, PIECES: gl.constexpr, row_start=None, lead=0,
):  # fmt: skip
    """Log-sum-exps of a piece of a row are stored, and where the row's pieces are. sum_rows: of
    weights as a kernel has them (gluon_rows).
    """
    if row_start is None:
        row_start = position
    row = here(row_first) + gl.arange(0, ROWS, rows)
    real = row < q_len * GROUP
    token_at = (q_start + row // GROUP).to(gl.int64)
    q_head_at = head * GROUP + row % GROUP
    if PIECES:
        whole = (here(first_tile) == 0) & (last_tile == tiles)
        total, row_lse, ratio = sum_rows(weights, anchor, rows)
        row_id = here(request) * kv_heads * ROW_TILES + item
        # A program may have many whole rows.
        slot_id = 2 * here(program) + (position != start).to(gl.int32)
        slot_id = gl.where(whole, 2 * gl.num_programs(0) + row_id, slot_id)
        # Never. Without a branch around what is stored Triton 3.6's lowering fails an assertion.
        complete = whole & (q_len < 0)
        if first_tile == 0:
            gl.store(cuts + row_id * 2, slot_id)
            _, last, _ = row_programs(program, position, row_start, tiles, share, even, lead)
            gl.store(cuts + row_id * 2 + 1, gl.where(whole, slot_id // 2, last))
    else:
        complete = (first_tile == 0) & (last_tile == tiles)
        total, row_lse, ratio = sum_rows(weights, anchor, rows)
        slot_id = 2 * program + (position != start).to(gl.int32)
        if first_tile == 0:
            cut = cuts + (request * kv_heads * ROW_TILES + item) * 2
            store_cut(
                cut, complete, slot_id, program, position, tiles, share, even, row_start, lead
            )
    if complete:
        if SINKS:
            row_lse, ratio = with_sink(row_lse, ratio, sinks, q_head_at, real)
        if lse is not None:
            at = lse + token_at * (kv_heads * GROUP) + q_head_at
            gl.store(at, row_lse * LN2, mask=real)
    else:
        piece = slot_id.to(gl.int64) * ROWS + gl.arange(0, ROWS, rows)
        gl.store(part_lse + piece, row_lse, mask=real)
    return Ended(complete, slot_id, ratio, total)


@gluon.jit
def end_outputs(
    o, mass, ended, row_first, q_start, q_len, head, v_scale, v_zero, v_scale_head,
    out, part_out, out_token, out_head, GROUP: gl.constexpr, V_SCALES: gl.constexpr,
    V_ZERO: gl.constexpr, V_SHARED: gl.constexpr,
):  # fmt: skip
    """Outputs, multiplied by their ratio, to the result or to a piece. mass: what the sink left of
    each row's weight: 1 without one, 0 for a row that saw nothing.
    """
    ROWS: gl.constexpr = o.shape[0]
    VALUE_DIM: gl.constexpr = o.shape[1]
    out_layout: gl.constexpr = o.type.layout
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    out_channel = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, out_layout))
    if V_SCALES == STATIC:
        static_at = head * v_scale_head + out_channel // V_SHARED
        o = o * gl.load(v_scale + static_at).to(gl.float32)[None, :]
        if V_ZERO:
            o += (
                gl.convert_layout(mass, out_rows)[:, None]
                * gl.load(v_zero + static_at).to(gl.float32)[None, :]
            )
    nth = gl.arange(0, ROWS, out_rows)
    out_row = row_first + nth
    keep = (out_row < q_len * GROUP)[:, None]
    if ended.complete:
        out_at = (q_start + out_row // GROUP).to(gl.int64) * out_token
        out_at += (head * GROUP + out_row % GROUP) * out_head
        out_at = out_at[:, None] + out_channel[None, :]
        gl.store(out + out_at, o.to(out.dtype.element_ty), mask=keep)
    else:
        part_at = (ended.slot_id.to(gl.int64) * ROWS + nth) * VALUE_DIM
        gl.store(part_out + part_at[:, None] + out_channel[None, :], o, mask=keep)
