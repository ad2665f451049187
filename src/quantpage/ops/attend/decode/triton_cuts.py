"""Rows that were cut, joined by a launch of its own; triton_pieces joins them within a launch."""

import triton
import triton.language as tl

from quantpage.ops.attend.decode.triton_pieces import join_row
from quantpage.ops.attend.decode.triton_share import cut_of_one, key_ranges, tile_ranges


@triton.jit
def _wait_for(at):
    """Wait for the launch before when ``at``, not negative, is known: the assembler would work it
    out behind the wait.
    """
    if at >= 0:
        tl.extra.cuda.gdc_wait()


@triton.jit(
    do_not_specialize=["kv_heads", "window", "sink_tokens", "programs", "min_tiles"],
    do_not_specialize_on_alignment=["row_tiles"],
)
def merge_cuts_kernel(
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
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SINKS: tl.constexpr,
    PARTS: tl.constexpr,
    PAGE: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    OVERLAP: tl.constexpr,
    TURN: tl.constexpr = 0,
    programs=1,
    min_tiles=1,
    ONE: tl.constexpr = 0,
):
    """A row (request, kv_head, tile of query rows) that was cut, or that has no tile at all.

    Rows that one program finished are left as they are. earlier: results of other keys, float32,
    without which no row was finished; None where there are none. TURN: as of ``join_row``. ONE: of
    a step of one request, keys of a tile, by which it knows where pieces are before they are there:
    ``programs`` took them as cut_of_one says; 0: of others.
    """
    row_id = tl.program_id(0)
    request = row_id // (kv_heads * row_tiles)
    item = row_id % (kv_heads * row_tiles)
    # What decode itself waited for may be read before it ends.
    q_start = tl.load(query_starts + request)
    q_len = tl.load(query_starts + request + 1) - q_start
    context = tl.load(context_lens + request)
    a_low, a_high, b_low, b_high = key_ranges(
        context, tl.minimum(q_len, context), window, sink_tokens, PAGE, FULL, WINDOW, SEGMENT
    )
    nothing = (a_high <= a_low) & (b_high <= b_low)
    row_first = (item % row_tiles) * ROWS
    rows = tl.minimum(ROWS, q_len * GROUP - row_first)
    last = 0
    if ONE:
        _, a_tiles, _, b_tiles = tile_ranges(a_low, a_high, b_low, b_high, ONE)
        pieces, _, _, even = cut_of_one(a_tiles + b_tiles, tl.num_programs(0), programs, min_tiles)
        # A row of one piece may be finished already.
        written = (pieces <= 1) | (not even)
        slot = 2 * row_id * pieces
        last = row_id * pieces + tl.maximum(pieces, 1) - 1
    if OVERLAP:
        _wait_for(last)
        tl.extra.cuda.gdc_launch_dependents()
    if ONE:
        slot = tl.load(cuts + row_id * 2, written, slot)
        last = tl.load(cuts + row_id * 2 + 1, written, last)
    else:
        slot = tl.load(cuts + row_id * 2)
        last = tl.load(cuts + row_id * 2 + 1)
    # The slot says nothing about a row that no program came by.
    if nothing | (slot >= 0):
        first_program = slot // 2
        parts = tl.where(nothing, 0, last - first_program + 1)
        # Later programs hold their piece of this row in their first slot.
        join_row(
            part_out, part_lse, sinks, out, lse, slot, first_program, parts, 1, rows, row_first,
            item // row_tiles, q_start, kv_heads, out_token, out_head, GROUP, ROWS, VALUE_DIM,
            SINKS, PARTS, tl.program_id(1), tl.num_programs(1), earlier_out, earlier_lse, TURN,
        )  # fmt: skip
