"""Decode: split-KV attention over quantized pages for 1 to 16 query tokens a request.

One launch of a fixed grid walks equal shares of all tiles (triton_share); rows that were cut are
joined by it (triton_pieces) or by a second (triton_cuts). Codes are read as 32-bit words
(ops/triton/words) and multiplied in float16, in which every code is exact; scales never touch one:

    S = (q . k_code) * k_scale[token] + sum(q) * k_zero[token]
    O = sum (p * v_scale[token]) v_code + sum(p * v_zero[token])

Both products are turned over, keys by queries: the tensor cores' tiles have sixteen rows and eight
columns, and a group of four queries wastes half of eight columns where it would waste twelve of
sixteen rows, in the products and in all of the softmax.

Static scales belong to channels, so they are folded into q before and into O after. Queries are
scaled so that their largest element is 2^14, and p so that the largest p * v_scale of a row is
2^12: float16 neither overflows nor flushes whatever the cache holds. What slots outside the mask
hold is not loaded, or selected away: scores, scales and floating point values; integer codes are
finite and meet a p of 0. Keys of 4 bits, and of planes, are multiplied as they lie, a thousand too
large, and the query's sum takes that off again.
"""

import triton
import triton.language as tl

from quantpage.ops.attend.decode.triton_parts import first_channel, parts_of, store_parts, width_of
from quantpage.ops.attend.decode.triton_pieces import finish_empty, join_cut
from quantpage.ops.attend.decode.triton_planes import half_of
from quantpage.ops.attend.decode.triton_share import (
    CUT_COST,
    key_ranges,
    my_share,
    request_tiles,
    row_programs,
    tile_ranges,
    with_lead,
)
from quantpage.ops.attend.decode.triton_tiles import walk_tiles
from quantpage.ops.triton.common import LN2, LOG2E, STATIC
from quantpage.ops.triton.planes import in_planes


# Numbers that change from step to step or from model to model compile no kernel of their own.
@triton.jit(
    do_not_specialize=["requests", "kv_heads", "min_tiles", "window", "sink_tokens", "table_row"]
)
def decode_kernel(
    q,
    k_codes,
    v_codes,
    k_scale,
    v_scale,
    k_zero,
    v_zero,
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
    kv_heads,
    min_tiles,
    window,
    sink_tokens,
    q_token,
    q_head,
    k_page,
    k_head,
    v_page,
    v_head,
    k_scale_page,
    k_scale_head,
    v_scale_page,
    v_scale_head,
    table_row,
    out_token,
    out_head,
    K_CODE: tl.constexpr,
    V_CODE: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_SCALES: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_ZERO: tl.constexpr,
    K_SHARED: tl.constexpr,
    V_SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PIECES: tl.constexpr,
    BESIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OLD: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
    GATHER: tl.constexpr,
    WHOLE: tl.constexpr,
    HIDES: tl.constexpr,
):
    """K_SCALES, V_SCALES: 0 none, 1 a token and kv_head, 2 static; codes: numbers of
    ops/operand. SHARED: channels that share a static scale. ROWS: query rows (token x group) of a
    tile. PIECES: rows that are not cut leave a piece, too. BESIDE: nothing is read of the launch
    before, which began when all that this one reads was there, and runs beside it. GATHER: pieces
    that are joined at once; 0: another launch joins. WHOLE: programs take whole rows, none is cut.
    HIDES: values are 16-bit numbers, and a query may see one that another does not.
    """
    program = tl.program_id(0)
    if OVERLAP:
        # The launches before and after overlap with this one: wait for what the first wrote, let
        # the next one be set up.
        if not BESIDE:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if WHOLE:
        start, end = program, requests * kv_heads * ROW_TILES
        share, request, begins = 1, program, 0
        even = False
    else:
        start, end, share, request, begins, even = my_share(
            query_starts, context_lens, requests, kv_heads * ROW_TILES, min_tiles, window,
            sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK, CUT_COST,
        )  # fmt: skip
        lead = tl.where(even, 0, CUT_COST)
    V_PARTS: tl.constexpr = parts_of(V_CODE)
    # As wide as walk_tiles makes the accumulators.
    V_WIDTH: tl.constexpr = width_of(VALUE_DIM, V_CODE)
    V_WIDTH4: tl.constexpr = V_WIDTH if V_PARTS > 1 else 16
    V_WIDTH8: tl.constexpr = V_WIDTH if V_PARTS > 4 else 16
    row = tl.arange(0, ROWS)
    v_word = tl.arange(0, V_WIDTH)
    v_word4 = tl.arange(0, V_WIDTH4)
    v_word8 = tl.arange(0, V_WIDTH8)
    k_half, v_half = 0, 0
    if in_planes(K_CODE):
        k_half = half_of(k_codes, width_of(HEAD_DIM, K_CODE), requests < 0)
    if in_planes(V_CODE):
        v_half = half_of(v_codes, V_WIDTH, requests < 0)

    position = start
    while position < end:
        if WHOLE:
            request = position // (kv_heads * ROW_TILES)
        context = tl.load(context_lens + request)
        q_start = tl.load(query_starts + request)
        q_len = tl.minimum(tl.load(query_starts + request + 1) - q_start, context)
        a_low, a_high, b_low, b_high = key_ranges(
            context, q_len, window, sink_tokens, PAGE, FULL, WINDOW, SEGMENT
        )
        a_first, a_tiles, b_first, b_tiles = tile_ranges(a_low, a_high, b_low, b_high, TILE)
        tiles = a_tiles + b_tiles
        if WHOLE:
            item = position % (kv_heads * ROW_TILES)
            first_tile = 0
            last_tile = tiles
        else:
            whole_row = with_lead(tiles, lead)
            item = (position - begins) // tl.maximum(whole_row, 1)
            row_start = begins + item * whole_row
            first_tile = tl.maximum(position - row_start - lead, 0)
            # What comes before a row may be all that the program has of it.
            last_tile = tl.maximum(tl.minimum(tiles, end - row_start - lead), first_tile)
        head = (item // ROW_TILES).to(tl.int64)

        row_at = (item % ROW_TILES) * ROWS + row
        token = row_at // GROUP
        real = token < q_len
        seat = context - q_len + token
        q_head_at = head * GROUP + row_at % GROUP
        token_at = (q_start + token).to(tl.int64)
        q_rows = token_at * q_token + q_head_at * q_head

        table = page_table + request.to(tl.int64) * table_row
        row_lse, ratio, total, extra, acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7 = walk_tiles(
            q, q_rows, real, seat, head, context, q_len, table, first_tile, last_tile,
            a_low, a_high, b_low, b_high, a_first, a_tiles, b_first,
            k_codes, v_codes, k_scale, v_scale, k_zero, v_zero, k_page, k_head, v_page, v_head,
            k_scale_page, k_scale_head, v_scale_page, v_scale_head, k_half, v_half,
            softmax_scale, softcap, window, sink_tokens, K_CODE, V_CODE, K_SCALES, V_SCALES,
            K_ZERO, V_ZERO, K_SHARED, HEAD_DIM, VALUE_DIM, PAGE, ROWS, TILE, FULL, WINDOW, SEGMENT,
            SOFTCAP, STAGES, OLD, PAIRS, HIDES,
        )  # fmt: skip

        if last_tile > first_tile:
            whole = (first_tile == 0) & (last_tile == tiles)
            row_id = request * kv_heads * ROW_TILES + item
            slot_id = 2 * program + (position != start).to(tl.int32)
            if PIECES:
                # A program may have many whole rows.
                slot_id = tl.where(whole, 2 * tl.num_programs(0) + row_id, slot_id)
                complete = False
            else:
                complete = whole
            if complete:
                if SINKS:
                    # One more key without a value.
                    sink = tl.load(sinks + q_head_at, real, 0.0).to(tl.float32) * LOG2E
                    peak_lse = tl.maximum(row_lse, sink)
                    with_sink = peak_lse + tl.log2(
                        tl.exp2(row_lse - peak_lse) + tl.exp2(sink - peak_lse)
                    )
                    ratio = ratio * tl.exp2(row_lse - with_sink)
                    row_lse = with_sink
                if lse is not None:
                    at = lse + token_at * (kv_heads * GROUP) + q_head_at
                    tl.store(at, row_lse * LN2, real)
            else:
                part_at = slot_id.to(tl.int64) * ROWS + row
                tl.store(part_lse + part_at, row_lse, real)
            if GATHER == 0 and not WHOLE and first_tile == 0:
                # Where the row's pieces are, for the merge: the first one's slot, -1 for none, and
                # the program that holds the last.
                cut = cuts + row_id * 2
                tl.store(cut, tl.where(complete, -1, slot_id))
                _, last, _ = row_programs(program, position, row_start, tiles, share, even, lead)
                if PIECES:
                    last = tl.where(whole, slot_id // 2, last)
                tl.store(cut + 1, last)
            extra = extra * ratio
            # What the sink left of the row's weight: 1 without one, 0 for a row that saw nothing.
            mass = total * ratio
            vs_static = v_scale + head * v_scale_head
            vz_static = v_zero + head * v_scale_head
            static: tl.constexpr = V_SCALES == STATIC
            static_zero: tl.constexpr = (V_SCALES == STATIC) & V_ZERO
            v_first = first_channel(v_word, VALUE_DIM, V_WIDTH, V_CODE)
            v_first4 = first_channel(v_word4, VALUE_DIM, V_WIDTH, V_CODE)
            v_first8 = first_channel(v_word8, VALUE_DIM, V_WIDTH, V_CODE)
            # Two destinations of two types: the result, or a float32 partial.
            if complete:
                to = out + token_at * out_token + q_head_at * out_head
                store_parts(
                    to, acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7, real, ratio, mass, extra,
                    vs_static, vz_static, v_first, v_first4, v_first8, VALUE_DIM, V_CODE, static,
                    static_zero, V_SHARED,
                )  # fmt: skip
            else:
                to_part = part_out + (slot_id.to(tl.int64) * ROWS + row) * VALUE_DIM
                store_parts(
                    to_part, acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7, real, ratio, mass,
                    extra, vs_static, vz_static, v_first, v_first4, v_first8, VALUE_DIM, V_CODE,
                    static, static_zero, V_SHARED,
                )  # fmt: skip
                if GATHER > 0:
                    row_first = (item % ROW_TILES) * ROWS
                    first, last, slot = row_programs(
                        program, position, row_start, tiles, share, even, lead
                    )
                    join_cut(
                        cuts, part_out, part_lse, sinks, out, lse, program,
                        row_id, first, last, slot,
                        requests * kv_heads * ROW_TILES,
                        tl.minimum(ROWS, q_len * GROUP - row_first), row_first, item // ROW_TILES,
                        q_start, kv_heads, out_token, out_head, GROUP, ROWS, VALUE_DIM, SINKS,
                        GATHER,
                    )  # fmt: skip
        if WHOLE:
            position += tl.num_programs(0)
        else:
            position = row_start + whole_row
            if position - begins >= whole_row * kv_heads * ROW_TILES:
                request += 1
                begins = position
    if BESIDE:  # noqa: SIM102
        # Whoever waits for this launch waits for the one beside it, too: that one program ends
        # behind it is enough, and the others leave their places to those that have not begun.
        if program == tl.num_programs(0) - 1:
            tl.extra.cuda.gdc_wait()
    if GATHER > 0 or WHOLE:
        for empty in range(program, requests, tl.num_programs(0)):
            if request_tiles(
                query_starts, context_lens, empty, window, sink_tokens, PAGE, TILE, FULL, WINDOW,
                SEGMENT,
            ) == 0:  # fmt: skip
                finish_empty(
                    empty, query_starts, part_out, part_lse, sinks, out, lse, kv_heads, out_token,
                    out_head, GROUP, ROWS, VALUE_DIM, SINKS,
                )  # fmt: skip
