"""How a program ends the rows that it has walked: results of whole rows, pieces of rows that were
cut. What the Hopper kernels of decode share; outputs are given as [rows, channels].
"""

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode import triton_pieces
from quantpage.ops.attend.decode.gluon_rows import store_cut, with_sink
from quantpage.ops.attend.decode.gluon_share import here
from quantpage.ops.triton.common import LN2, LOG2E, STATIC

add_key = gluon.jit(triton_pieces.add_key.fn)


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
    other_share: Any
    """The weight of the result of other keys, where one enters."""


@gluon.jit
def end_sums(
    weights, anchor, rows: gl.constexpr, sum_rows: gl.constexpr, row_first, q_start, q_len, head,
    kv_heads, first_tile, last_tile, tiles, program, position, start, request, item, share, even,
    earlier_lse, cuts, sinks, lse, part_lse, GROUP: gl.constexpr, ROWS: gl.constexpr,
    ROW_TILES: gl.constexpr, SINKS: gl.constexpr, EARLIER: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """Log-sum-exps of a piece of a row are stored, and where the row's pieces are. sum_rows: of
    weights as a kernel has them (gluon_rows).
    """
    row = here(row_first) + gl.arange(0, ROWS, rows)
    real = row < q_len * GROUP
    token_at = (q_start + row // GROUP).to(gl.int64)
    q_head_at = head * GROUP + row % GROUP
    complete = (first_tile == 0) & (last_tile == tiles)
    total, row_lse, ratio = sum_rows(weights, anchor, rows)
    slot_id = 2 * program + (position != start).to(gl.int32)
    other_share = ratio
    if EARLIER:
        if BESIDE:
            tl.extra.cuda.gdc_wait()
        # Rows that were cut take it in where they are joined.
        earlier_at = earlier_lse + token_at * (kv_heads * GROUP) + q_head_at
        own = gl.load(earlier_at, mask=real & complete, other=float("-inf")) * LOG2E
        row_lse, ratio, other_share = add_key(row_lse, ratio, own)
    if first_tile == 0:
        cut = cuts + (request * kv_heads * ROW_TILES + item) * 2
        store_cut(cut, complete, slot_id, program, position, tiles, share, even)
    if complete:
        if SINKS:
            without = row_lse
            row_lse, ratio = with_sink(row_lse, ratio, sinks, q_head_at, real)
            if EARLIER:
                other_share *= gl.exp2(without - row_lse)
        if lse is not None:
            at = lse + token_at * (kv_heads * GROUP) + q_head_at
            gl.store(at, row_lse * LN2, mask=real)
    else:
        piece = slot_id.to(gl.int64) * ROWS + gl.arange(0, ROWS, rows)
        gl.store(part_lse + piece, row_lse, mask=real)
    return Ended(complete, slot_id, ratio, total, other_share)


@gluon.jit
def end_outputs(
    o, mass, ended, row_first, q_start, q_len, head, kv_heads, v_scale, v_zero, v_scale_head,
    earlier_out, out, part_out, out_token, out_head, GROUP: gl.constexpr, V_SCALES: gl.constexpr,
    V_ZERO: gl.constexpr, V_SHARED: gl.constexpr, EARLIER: gl.constexpr,
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
    if EARLIER:
        taken = gl.convert_layout(ended.other_share, out_rows)[:, None]
        earlier_at = (q_start + out_row // GROUP).to(gl.int64) * (kv_heads * GROUP)
        earlier_at = (earlier_at + head * GROUP + out_row % GROUP) * VALUE_DIM
        # A share of nothing is of rows that were cut, too.
        o += taken * gl.load(
            earlier_out + earlier_at[:, None] + out_channel[None, :],
            mask=keep & (taken != 0.0),
            other=0.0,
        )
    if ended.complete:
        out_at = (q_start + out_row // GROUP).to(gl.int64) * out_token
        out_at += (head * GROUP + out_row % GROUP) * out_head
        out_at = out_at[:, None] + out_channel[None, :]
        gl.store(out + out_at, o.to(out.dtype.element_ty), mask=keep)
    else:
        part_at = (ended.slot_id.to(gl.int64) * ROWS + nth) * VALUE_DIM
        gl.store(part_out + part_at[:, None] + out_channel[None, :], o, mask=keep)
