"""Decode over latent rows: the kernel. Who has which tiles is decode/triton_share's plan."""

import triton
import triton.language as tl

from quantpage.ops.attend.decode.triton_share import my_share, request_tiles, row_programs
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.attend.latent import triton_keys, triton_rows
from quantpage.ops.attend.latent.triton_parts import Plane, Scoring, sums, with_sink
from quantpage.ops.triton.common import LN2, NONE


# Numbers that change from step to step or from model to model compile no kernel of their own.
# Nor does the number of tiles of query rows, which is a prompt's length, but that of a decode: 1.
@triton.jit(
    do_not_specialize=["requests", "min_tiles", "window", "sink_tokens", "table_row"],
    do_not_specialize_on_alignment=["row_tiles"],
)
def decode_kernel(
    q,
    row_codes,
    row_scale,
    rotary_codes,
    rotary_scale,
    page_table,
    query_starts,
    context_lens,
    sinks,
    out,
    lse,
    part_out,
    part_lse,
    cuts,
    softmax_scale,
    softcap,
    requests,
    row_tiles,
    min_tiles,
    window,
    sink_tokens,
    q_token,
    q_head,
    row_page,
    row_scale_page,
    rotary_page,
    rotary_scale_page,
    table_row,
    out_token,
    out_head,
    ROW_CODE: tl.constexpr,
    ROTARY_CODE: tl.constexpr,
    ROW_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    ROTARY_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRS: tl.constexpr,
    HIDES: tl.constexpr,
    OLD: tl.constexpr,
    BY_KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A fixed grid; a program takes its share of all (request, tile of query rows, tile of keys).

    Rows that one program does not finish leave pieces, which decode/triton_cuts joins.
    """
    program = tl.program_id(0)
    if OVERLAP:
        # The launches before and after overlap with this one: wait for what the first wrote, let
        # the next one be set up.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start, end, share, request, begins, even = my_share(
        query_starts, context_lens, requests, row_tiles, min_tiles, window, sink_tokens, PAGE, TILE,
        FULL, WINDOW, ALL_KEYS, CHUNK,
    )  # fmt: skip
    ROW_NUMBER: tl.constexpr = row_codes.dtype.element_ty if ROW_CODE == NONE else tl.float16
    ROTARY_NUMBER: tl.constexpr = (
        rotary_codes.dtype.element_ty if ROTARY_CODE == NONE else tl.float16
    )
    SHIFT: tl.constexpr = 0.0 if tl.bfloat16 == ROW_NUMBER else 12.0
    lane = tl.arange(0, ROWS)
    position = start
    item, first_tile, tiles, context, q_start, q_len = _place(
        query_starts, context_lens, position, begins, request, requests, window, sink_tokens, PAGE,
        TILE, FULL, WINDOW,
    )  # fmt: skip
    if not BY_KEYS:
        # Asked for a row ahead: as what a loop carries, queries lie in shared memory for the
        # products of a warpgroup, and take no registers.
        q0, q1, q_turned, left = triton_rows.load_queries(
            q, q_start, q_len, item * ROWS, position < end, q_token, q_head, ROW_DIM, ROTARY_DIM,
            ROW_WIDTH, ROTARY_WIDTH, HEADS, ROWS, ROW_NUMBER, ROTARY_NUMBER,
        )  # fmt: skip
    while position < end:
        last_tile = tl.minimum(tiles, first_tile + end - position)
        row_at = item * ROWS + lane
        token = row_at // HEADS
        real = token < q_len
        head = row_at % HEADS
        token_at = (q_start + token).to(tl.int64)
        table = page_table + request.to(tl.int64) * table_row
        if BY_KEYS:
            acc, top, total = triton_keys.walk(
                q, q_start, q_len, token, head, q_token, q_head,
                Plane(row_codes, row_scale, row_page, row_scale_page, ROW_DIM, ROW_WIDTH, ROW_CODE),
                Plane(
                    rotary_codes, rotary_scale, rotary_page, rotary_scale_page, ROTARY_DIM,
                    ROTARY_WIDTH, ROTARY_CODE,
                ),
                table, context, first_tile, last_tile,
                Scoring(
                    softmax_scale, softcap, window, sink_tokens, FULL, WINDOW, SOFTCAP, SHIFT,
                    PAIRS, HIDES, OLD,
                ),
                ROWS, TILE, PAGE, STAGES,
            )  # fmt: skip
        else:
            acc0, acc1, top, total = triton_rows.walk(
                q0, q1, q_turned, left, context - q_len + token,
                Plane(row_codes, row_scale, row_page, row_scale_page, ROW_DIM, ROW_WIDTH, ROW_CODE),
                Plane(
                    rotary_codes, rotary_scale, rotary_page, rotary_scale_page, ROTARY_DIM,
                    ROTARY_WIDTH, ROTARY_CODE,
                ),
                table, context, q_len, first_tile, last_tile,
                Scoring(
                    softmax_scale, softcap, window, sink_tokens, FULL, WINDOW, SOFTCAP, SHIFT,
                    PAIRS, HIDES, OLD,
                ),
                ROWS, TILE, PAGE, STAGES,
            )  # fmt: skip
        if last_tile > first_tile:
            complete = (first_tile == 0) & (last_tile == tiles)
            row_lse, ratio = sums(top, total, SHIFT)
            slot_id = 2 * program + (position != start).to(tl.int32)
            if first_tile == 0:
                # Where the row's pieces are, for the merge: the first one's slot, -1 for none, and
                # the program that holds the last.
                cut = cuts + (request * row_tiles + item) * 2
                tl.store(cut, tl.where(complete, -1, slot_id))
                _, last, _ = row_programs(program, position, position, tiles, share, even)
                tl.store(cut + 1, last)
            # Two destinations of two types: the result, or a float32 partial.
            if complete:
                if SINKS:
                    row_lse, ratio = with_sink(row_lse, ratio, sinks, head, real)
                if lse is not None:
                    tl.store(lse + token_at * HEADS + head, row_lse * LN2, real)
                to = out + token_at * out_token + head.to(tl.int64) * out_head
                if BY_KEYS:
                    triton_keys.store(to, acc, ratio, real, ROW_DIM)
                else:
                    triton_rows.store(to, acc0, acc1, ratio, real, ROW_DIM)
            else:
                part_at = slot_id.to(tl.int64) * ROWS + lane
                tl.store(part_lse + part_at, row_lse, real)
                part = part_out + part_at * ROW_DIM
                if BY_KEYS:
                    triton_keys.store(part, acc, ratio, real, ROW_DIM)
                else:
                    triton_rows.store(part, acc0, acc1, ratio, real, ROW_DIM)
        position += last_tile - first_tile
        if position - begins >= tiles * row_tiles:
            request += 1
            begins = position
        item, first_tile, tiles, context, q_start, q_len = _place(
            query_starts, context_lens, position, begins, request, requests, window, sink_tokens,
            PAGE, TILE, FULL, WINDOW,
        )  # fmt: skip
        if not BY_KEYS:
            q0, q1, q_turned, left = triton_rows.load_queries(
                q, q_start, q_len, item * ROWS, position < end, q_token, q_head, ROW_DIM,
                ROTARY_DIM, ROW_WIDTH, ROTARY_WIDTH, HEADS, ROWS, ROW_NUMBER, ROTARY_NUMBER,
            )  # fmt: skip


@triton.jit
def _place(
    query_starts, context_lens, position, begins, request, requests, window, sink_tokens,
    PAGE: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Where a place in the line of tiles is: tile of query rows and first tile of keys, the tiles
    of such a row, and the request's context, first token and new tokens.
    """
    # Past the last request nothing is read.
    request = tl.minimum(request, requests - 1)
    context = tl.load(context_lens + request)
    q_start = tl.load(query_starts + request)
    q_len = tl.minimum(tl.load(query_starts + request + 1) - q_start, context)
    tiles = request_tiles(
        query_starts, context_lens, request, window, sink_tokens, PAGE, TILE, FULL, WINDOW, ALL_KEYS
    )
    item = (position - begins) // tl.maximum(tiles, 1)
    return item, position - begins - item * tiles, tiles, context, q_start, q_len
