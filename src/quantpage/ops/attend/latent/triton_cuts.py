"""A prompt's rows that were cut, joined by a launch of its own (prompts.py says which)."""

import triton
import triton.language as tl

from quantpage.ops.attend.decode.triton_pieces import join_row


@triton.jit
def join_rows_kernel(
    cuts,
    part_out,
    part_lse,
    query_starts,
    sinks,
    out,
    lse,
    out_token,
    out_head,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_DIM: tl.constexpr,
    SINKS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Programs [cut rows, query rows side by side]. cuts: int32 [cut rows, 4], CUT_FIELDS."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    cut = cuts + tl.program_id(0) * 4
    slot = tl.load(cut)
    pieces = tl.load(cut + 1)
    request = tl.load(cut + 2)
    row_first = tl.load(cut + 3)
    q_start = tl.load(query_starts + request)
    q_len = tl.load(query_starts + request + 1) - q_start
    rows = tl.minimum(ROWS, q_len * HEADS - row_first)
    # A slot is two pieces wide, as a program's of decode.
    join_row(
        part_out, part_lse, sinks, out, lse, 2 * slot, slot, pieces, 1, rows, row_first, 0, q_start,
        1, out_token, out_head, HEADS, ROWS, ROW_DIM, SINKS, PARTS, tl.program_id(1),
        tl.num_programs(1),
    )  # fmt: skip
