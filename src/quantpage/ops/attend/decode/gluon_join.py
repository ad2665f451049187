"""Rows that were cut, joined on Hopper: a warp a query row, several rows a program.

What triton_cuts does with a program of one warp a row, of which 17 fit on a multiprocessor by their
registers: many rows (drafts, exact pages of many requests) waited for each other. A row's pieces
lie in the registers of its warp, which reads their sums in every thread that needs one: nothing
crosses warps. In Triton, which chooses layouts itself, the same has 24 barriers.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_share import key_ranges
from quantpage.ops.triton.common import LN2, LOG2E


@gluon.jit
def _neighbours(x, APART: gl.constexpr):
    """Of channels ``APART`` from each other the sum, and the first less the second."""
    ROWS: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    pairs = gl.reshape(x, [ROWS, WIDTH // (2 * APART), 2, APART])
    sums: gl.constexpr = gl.SliceLayout(2, pairs.type.layout)
    sides: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, pairs.type.layout)))
    both = gl.convert_layout(gl.sum(pairs, 2), sums)[:, :, None, :]
    second = gl.arange(0, 2, sides)[None, None, :, None] == 1
    return gl.reshape(gl.where(second, both - 2.0 * pairs, both), [ROWS, WIDTH])


@gluon.jit
def _turned(x, BLOCK: gl.constexpr):
    """formats/rotate of rows [rows, channels], as triton/hadamard's."""
    layout: gl.constexpr = x.type.layout
    STAGES: gl.constexpr = BLOCK.bit_length() - 1
    for i in gl.static_range(STAGES):
        x = gl.convert_layout(_neighbours(x, 1 << i), layout)
    return x * (1.0 / (BLOCK**0.5))


@gluon.jit(
    do_not_specialize=["kv_heads", "window", "sink_tokens"],
    do_not_specialize_on_alignment=["row_tiles"],
)
def join_kernel(
    cuts,
    part_out,
    part_lse,
    query_starts,
    context_lens,
    sinks,
    out,
    lse,
    earlier_out,
    earlier_lse,
    kv_heads,
    row_tiles,
    window,
    sink_tokens,
    out_token,
    out_head,
    VALUE_DIM: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    SINKS: gl.constexpr,
    PARTS: gl.constexpr,
    PAGE: gl.constexpr,
    FULL: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENT: gl.constexpr,
    OVERLAP: gl.constexpr,
    TURN: gl.constexpr,
):
    """Arguments as in triton_cuts.merge_cuts_kernel; query rows of a program: as many as warps."""
    QUERIES: gl.constexpr = gl.num_warps()
    pieces: gl.constexpr = gl.BlockedLayout(
        [1, 1, VALUE_DIM // 32], [1, 1, 32], [1, QUERIES, 1], [2, 1, 0]
    )
    sums_of: gl.constexpr = gl.SliceLayout(2, pieces)
    of_rows: gl.constexpr = gl.SliceLayout(0, sums_of)
    outputs: gl.constexpr = gl.SliceLayout(0, pieces)
    beside: gl.constexpr = gl.SliceLayout(1, outputs)
    row_id = gl.program_id(0)
    request = row_id // (kv_heads * row_tiles)
    item = row_id % (kv_heads * row_tiles)
    # What decode itself waited for may be read before it ends.
    q_start = gl.load(query_starts + request)
    q_len = gl.load(query_starts + request + 1) - q_start
    context = gl.load(context_lens + request)
    a_low, a_high, b_low, b_high = key_ranges(
        context, gl.minimum(q_len, context), window, sink_tokens, PAGE, FULL, WINDOW, SEGMENT
    )
    nothing = (a_high <= a_low) & (b_high <= b_low)
    row_first = (item % row_tiles) * ROWS
    row = gl.program_id(1) * QUERIES + gl.arange(0, QUERIES, of_rows)
    asked = row < gl.minimum(ROWS, q_len * GROUP - row_first)
    head = item // row_tiles * GROUP + (row_first + row) % GROUP
    token_at = (q_start + (row_first + row) // GROUP).to(gl.int64)
    at = token_at * (kv_heads * GROUP) + head
    channel = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, outputs))[None, :]
    out_at = gl.convert_layout(at, beside)[:, None] * VALUE_DIM + channel
    out_asked = gl.convert_layout(asked, beside)[:, None]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    slot = gl.load(cuts + row_id * 2)
    last = gl.load(cuts + row_id * 2 + 1)
    # The slot says nothing about a row that no program came by.
    if nothing | (slot >= 0):
        base = slot // 2
        count = gl.where(nothing, 0, last - base + 1)
        if earlier_lse is not None:
            # One more piece, asked for before the others.
            own = gl.load(earlier_lse + at, mask=asked, other=float("-inf")) * LOG2E
            some = gl.convert_layout(own != float("-inf"), beside)[:, None] & out_asked
            others = gl.load(earlier_out + out_at, mask=some, other=0.0)
        top = gl.full([QUERIES], float("-inf"), gl.float32, of_rows)
        total = gl.full([QUERIES], 0.0, gl.float32, of_rows)
        acc = gl.full([QUERIES, VALUE_DIM], 0.0, gl.float32, outputs)
        nth = gl.arange(0, PARTS, gl.SliceLayout(1, sums_of))
        for first in range(0, count, PARTS):
            start = (2 * (base + first) * ROWS).to(gl.int64)
            # Later programs hold their piece of this row in their first slot.
            aside = gl.where(first == 0, (slot - 2 * base) * ROWS, 0)
            place = (nth * (2 * ROWS) + gl.where(nth == 0, aside, 0))[:, None] + row[None, :]
            real = (nth < count - first)[:, None] & asked[None, :]
            # Past the first-level cache, which may hold what the last launch left here.
            sums = gl.load(
                part_lse + start + place, mask=real, other=float("-inf"), cache_modifier=".cg"
            )
            piece_at = place[:, :, None] * VALUE_DIM + channel[None, :, :]
            piece = gl.load(
                part_out + start * VALUE_DIM + piece_at, mask=real[:, :, None], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            new_top = gl.maximum(top, gl.max(sums, 0))
            anchor = gl.where(new_top == float("-inf"), 0.0, new_top)
            weight = gl.exp2(sums - anchor[None, :])
            shrink = gl.exp2(top - anchor)
            # Select: a piece that saw nothing was not promised to be finite.
            piece = gl.where((sums != float("-inf"))[:, :, None], piece, 0.0)
            acc = acc * gl.convert_layout(shrink, beside)[:, None]
            acc += gl.sum(piece * weight[:, :, None], 0)
            total = total * shrink + gl.sum(weight, 0)
            top = new_top
        if earlier_lse is not None:
            new_top = gl.maximum(top, own)
            anchor = gl.where(new_top == float("-inf"), 0.0, new_top)
            shrink, weight = gl.exp2(top - anchor), gl.exp2(own - anchor)
            acc = acc * gl.convert_layout(shrink, beside)[:, None]
            acc += others * gl.convert_layout(weight, beside)[:, None]
            total = total * shrink + weight
            top = new_top
        if SINKS:
            sink = gl.load(sinks + head, mask=asked, other=0.0).to(gl.float32) * LOG2E
            new_top = gl.maximum(top, sink)
            shrink = gl.exp2(top - new_top)
            acc = acc * gl.convert_layout(shrink, beside)[:, None]
            total = total * shrink + gl.exp2(sink - new_top)
            top = new_top
        safe = gl.where(total != 0, total, 1.0)
        made = acc / gl.convert_layout(safe, beside)[:, None]
        if TURN:
            made = _turned(made, TURN)
        to = token_at * out_token + head.to(gl.int64) * out_head
        to = gl.convert_layout(to, beside)[:, None] + channel
        gl.store(out + to, made.to(out.dtype.element_ty), mask=out_asked)
        if lse is not None:
            row_lse = gl.where(total != 0, top + gl.log2(safe), float("-inf"))
            gl.store(lse + at, row_lse * LN2, mask=asked)
