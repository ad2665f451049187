"""Decode: split-KV attention over quantized pages for 1 to 16 query tokens a request.

One launch of a fixed grid walks equal shares of all tiles (triton_plan) and a second merges the
rows that were cut (triton_merge). Codes are read as 32-bit words (triton_words) and multiplied in
float16, in which every code is exact; scales never touch a code:

    S = (q . k_code) * k_scale[token] + sum(q) * k_zero[token]
    O = sum (p * v_scale[token]) v_code + sum(p * v_zero[token])

Both products are turned over, keys by queries: the tensor cores' tiles have sixteen rows and eight
columns, and a group of four queries wastes half of eight columns where it would waste twelve of
sixteen rows, in the products and in all of the softmax.

Static scales belong to channels, so they are folded into q before and into O after. Queries are
scaled so that their largest element is 2^14, and p so that the largest p * v_scale of a row is
2^12: float16 neither overflows nor flushes whatever the cache holds. What slots outside the mask
hold is not loaded, or selected away: scores, scales and floating point values; integer codes are
finite and meet a p of 0.
"""

import triton
import triton.language as tl

from quantpage.ops.attend.triton_plan import key_ranges, my_share, tile_ranges
from quantpage.ops.attend.triton_words import load_plane, log2_fast, unpack4, unpack8

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _query_part(
    q, channel, q_rows, real, k_scale, k_zero, HEAD_DIM: tl.constexpr,
    STATIC: tl.constexpr, STATIC_ZERO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One strided part of the queries with static scales folded in, its largest element, and its
    share of the row's sums.
    """
    mask = real[None, :] & (channel < HEAD_DIM)[:, None]
    part = tl.load(q + q_rows[None, :] + channel[:, None], mask, 0.0).to(tl.float32)
    if STATIC_ZERO:
        zero = tl.load(k_zero + channel // SHARED, channel < HEAD_DIM, 0.0).to(tl.float32)
        total = tl.sum(part * zero[:, None], 0)
    else:
        total = tl.sum(part, 0)
    if STATIC:
        scale = tl.load(k_scale + channel // SHARED, channel < HEAD_DIM, 0.0).to(tl.float32)
        part = part * scale[:, None]
    size = tl.abs(part)
    return part, tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 0), 0), total


@triton.jit
def _store_part(
    at, acc, channel, real, ratio, mass, extra, v_scale, v_zero, VALUE_DIM: tl.constexpr,
    STATIC: tl.constexpr, STATIC_ZERO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One strided part of the output, finished and stored."""
    inside = channel < VALUE_DIM
    out = acc * ratio[None, :]
    if STATIC:
        scale = tl.load(v_scale + channel // SHARED, inside, 0.0).to(tl.float32)
        out = out * scale[:, None]
    if STATIC_ZERO:
        zero = tl.load(v_zero + channel // SHARED, inside, 0.0).to(tl.float32)
        out += mass[None, :] * zero[:, None]
    out += extra[None, :]
    at = at[None, :] + channel[:, None]
    tl.store(at, out.to(at.dtype.element_ty), real[None, :] & inside[:, None])


@triton.jit
def _shown(
    key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens, WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """Keys that some query of the request sees."""
    shown = key < b_high
    if WINDOW or SEGMENT != 0:
        shown = ((key >= a_low) & (key < a_high)) | ((key >= b_low) & shown)
    if WINDOW and SEGMENT == 2:
        shown &= (key >= first_seat - window + 1) | (key < sink_tokens)
    return shown


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
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    OLD: tl.constexpr,
    PAIRS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """K_SCALES, V_SCALES: 0 none, 1 a token and kv_head, 2 static; codes: 0 none, 1 int8, 2 fp8,
    3 int4. SHARED: channels that share a static scale. ROWS: query rows (token x group) of a tile.
    """
    if OVERLAP:
        # The launches before and after overlap with this one: wait for what the first wrote, let
        # the next one be set up.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    start, end, share, request, begins = my_share(
        query_starts, context_lens, requests, kv_heads * ROW_TILES, min_tiles, window, sink_tokens,
        PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK,
    )  # fmt: skip
    K_PARTS: tl.constexpr = 1 if K_CODE == 0 else (8 if K_CODE == 3 else 4)
    V_PARTS: tl.constexpr = 1 if V_CODE == 0 else (8 if V_CODE == 3 else 4)
    K_WORDS: tl.constexpr = HEAD_DIM // K_PARTS
    V_WORDS: tl.constexpr = VALUE_DIM // V_PARTS
    # Products need an inner and an outer width of at least 16.
    K_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(K_WORDS))
    V_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(V_WORDS))
    # Widths of accumulators that this code does not have.
    V_WIDTH4: tl.constexpr = V_WIDTH if V_PARTS > 1 else 16
    V_WIDTH8: tl.constexpr = V_WIDTH if V_PARTS > 4 else 16
    V_NUMBER: tl.constexpr = v_codes.dtype.element_ty if V_CODE == 0 else tl.float16
    K_NUMBER: tl.constexpr = k_codes.dtype.element_ty if K_CODE == 0 else tl.float16
    SHIFT: tl.constexpr = 0.0 if tl.bfloat16 == V_NUMBER else 12.0
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, TILE)
    pair = tl.arange(0, TILE // 2)
    k_word = tl.arange(0, K_WIDTH)
    v_word = tl.arange(0, V_WIDTH)
    v_word4 = tl.arange(0, V_WIDTH4)
    v_word8 = tl.arange(0, V_WIDTH8)

    position = start
    while position < end:
        context = tl.load(context_lens + request)
        q_start = tl.load(query_starts + request)
        q_len = tl.minimum(tl.load(query_starts + request + 1) - q_start, context)
        a_low, a_high, b_low, b_high = key_ranges(
            context, q_len, window, sink_tokens, PAGE, FULL, WINDOW, SEGMENT
        )
        a_first, a_tiles, b_first, b_tiles = tile_ranges(a_low, a_high, b_low, b_high, TILE)
        tiles = a_tiles + b_tiles
        item = (position - begins) // tl.maximum(tiles, 1)
        first_tile = position - begins - item * tiles
        last_tile = tl.minimum(tiles, first_tile + end - position)
        head = (item // ROW_TILES).to(tl.int64)

        row_at = (item % ROW_TILES) * ROWS + row
        token = row_at // GROUP
        real = token < q_len
        seat = context - q_len + token
        q_head_at = head * GROUP + row_at % GROUP
        token_at = (q_start + token).to(tl.int64)
        q_rows = token_at * q_token + q_head_at * q_head

        # The queries, in the parts that the words of K come in.
        k_static = k_scale + head * k_scale_head
        kz_static = k_zero + head * k_scale_head
        q0, peak, q_sum = _query_part(
            q, k_word * K_PARTS, q_rows, real, k_static, kz_static, HEAD_DIM,
            K_SCALES == 2, (K_SCALES == 2) & K_ZERO, K_SHARED,
        )  # fmt: skip
        q1, q2, q3, q4, q5, q6, q7 = q0, q0, q0, q0, q0, q0, q0
        if K_PARTS > 1:
            q1, peak1, sum1 = _query_part(
                q, k_word * K_PARTS + 1, q_rows, real, k_static, kz_static, HEAD_DIM,
                K_SCALES == 2, (K_SCALES == 2) & K_ZERO, K_SHARED,
            )  # fmt: skip
            q2, peak2, sum2 = _query_part(
                q, k_word * K_PARTS + 2, q_rows, real, k_static, kz_static, HEAD_DIM,
                K_SCALES == 2, (K_SCALES == 2) & K_ZERO, K_SHARED,
            )  # fmt: skip
            q3, peak3, sum3 = _query_part(
                q, k_word * K_PARTS + 3, q_rows, real, k_static, kz_static, HEAD_DIM,
                K_SCALES == 2, (K_SCALES == 2) & K_ZERO, K_SHARED,
            )  # fmt: skip
            peak = tl.maximum(tl.maximum(peak, peak1), tl.maximum(peak2, peak3))
            q_sum += sum1 + sum2 + sum3
        if K_PARTS > 4:
            q4, peak4, sum4 = _query_part(
                q, k_word * K_PARTS + 4, q_rows, real, k_static, kz_static, HEAD_DIM,
                K_SCALES == 2, (K_SCALES == 2) & K_ZERO, K_SHARED,
            )  # fmt: skip
            q5, peak5, sum5 = _query_part(
                q, k_word * K_PARTS + 5, q_rows, real, k_static, kz_static, HEAD_DIM,
                K_SCALES == 2, (K_SCALES == 2) & K_ZERO, K_SHARED,
            )  # fmt: skip
            q6, peak6, sum6 = _query_part(
                q, k_word * K_PARTS + 6, q_rows, real, k_static, kz_static, HEAD_DIM,
                K_SCALES == 2, (K_SCALES == 2) & K_ZERO, K_SHARED,
            )  # fmt: skip
            q7, peak7, sum7 = _query_part(
                q, k_word * K_PARTS + 7, q_rows, real, k_static, kz_static, HEAD_DIM,
                K_SCALES == 2, (K_SCALES == 2) & K_ZERO, K_SHARED,
            )  # fmt: skip
            peak = tl.maximum(peak, tl.maximum(tl.maximum(peak4, peak5), tl.maximum(peak6, peak7)))
            q_sum += sum4 + sum5 + sum6 + sum7
        unit = 1.0
        if K_CODE != 0:
            unit = tl.where(peak > 1e-30, 16384.0 / tl.maximum(peak, 1e-30), 1.0)
        q0 = (q0 * unit).to(K_NUMBER)
        if K_PARTS > 1:
            q1 = (q1 * unit).to(K_NUMBER)
            q2 = (q2 * unit).to(K_NUMBER)
            q3 = (q3 * unit).to(K_NUMBER)
        if K_PARTS > 4:
            q4 = (q4 * unit).to(K_NUMBER)
            q5 = (q5 * unit).to(K_NUMBER)
            q6 = (q6 * unit).to(K_NUMBER)
            q7 = (q7 * unit).to(K_NUMBER)
        # Scores leave the product in the unit of the softmax: log2, or natural before a softcap.
        natural: tl.constexpr = 1.0 if SOFTCAP else LOG2E
        score_scale = softmax_scale * natural / unit
        q_sum = q_sum * (softmax_scale * natural)

        top = tl.full([ROWS], float("-inf"), tl.float32)
        # Summed over columns once, at the end: a sum across warps in every tile costs two barriers.
        weights = tl.zeros([TILE, ROWS], tl.float32)
        offsets = tl.zeros([TILE, ROWS], tl.float32)
        acc0 = tl.zeros([V_WIDTH, ROWS], tl.float32)
        acc1 = tl.zeros([V_WIDTH4, ROWS], tl.float32)
        acc2 = tl.zeros([V_WIDTH4, ROWS], tl.float32)
        acc3 = tl.zeros([V_WIDTH4, ROWS], tl.float32)
        acc4 = tl.zeros([V_WIDTH8, ROWS], tl.float32)
        acc5 = tl.zeros([V_WIDTH8, ROWS], tl.float32)
        acc6 = tl.zeros([V_WIDTH8, ROWS], tl.float32)
        acc7 = tl.zeros([V_WIDTH8, ROWS], tl.float32)

        # Keys that every query of this request sees: tiles inside need no mask by row.
        first_seat = context - q_len
        all_low = 0
        all_high = first_seat + 1
        if FULL:
            all_high = context
        if WINDOW:
            all_low = tl.maximum(context - window, 0)
        if SEGMENT == 1:
            all_low = tl.maximum(all_low, PAGE)
            all_high = tl.minimum(all_high, (first_seat // PAGE - 1) * PAGE)
        if SEGMENT == 2:
            all_high = 0
        table = page_table + request.to(tl.int64) * table_row
        k_base = k_codes + head * k_head
        v_base = v_codes + head * v_head
        for t in tl.range(first_tile, last_tile, num_stages=STAGES):
            tile = b_first + t
            if WINDOW or SEGMENT != 0:
                tile = tl.where(t < a_tiles, a_first + t, b_first + t - a_tiles)
            key_start = tile * TILE
            key = key_start + lane
            shown = _shown(
                key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens, WINDOW, SEGMENT
            )
            if PAGE >= TILE:
                page = tl.load(table + key_start // PAGE).to(tl.int64)
                slot = key_start % PAGE + lane
                k_rows = k_base + page * k_page + slot[:, None] * K_WORDS
                v_rows = v_base + page * v_page + slot[None, :] * V_WORDS
                pair_slot = key_start % PAGE + 2 * pair
                pair_page = page
            else:
                page = tl.load(table + key // PAGE, shown, 0).to(tl.int64)
                slot = key % PAGE
                k_rows = k_base + (page * k_page + slot * K_WORDS)[:, None]
                v_rows = v_base + (page * v_page + slot * V_WORDS)[None, :]
                if PAIRS:
                    pair_key = key_start + 2 * pair
                    pair_shown = _shown(
                        pair_key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens,
                        WINDOW, SEGMENT,
                    ) | _shown(
                        pair_key + 1, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens,
                        WINDOW, SEGMENT,
                    )  # fmt: skip
                    pair_page = tl.load(table + pair_key // PAGE, pair_shown, 0).to(tl.int64)
                    pair_slot = pair_key % PAGE
            # Scores are selected and integer codes are finite: only floats need the mask.
            k_mask = (k_word < K_WORDS)[None, :]
            v_mask = (v_word < V_WORDS)[:, None]
            if V_CODE == 0 or V_CODE == 2:
                v_mask = v_mask & shown[None, :]
            k = tl.load(k_rows + k_word[None, :], k_mask, 0)
            if K_PARTS == 1:
                score = tl.dot(k, q0)
            elif K_PARTS == 4:
                k0, k1, k2, k3 = unpack4(k, K_CODE, OLD)
                score = tl.dot(k0, q0)
                score = tl.dot(k1, q1, score)
                score = tl.dot(k2, q2, score)
                score = tl.dot(k3, q3, score)
            else:
                k0, k1, k2, k3, k4, k5, k6, k7 = unpack8(k)
                score = tl.dot(k0, q0)
                score = tl.dot(k1, q1, score)
                score = tl.dot(k2, q2, score)
                score = tl.dot(k3, q3, score)
                score = tl.dot(k4, q4, score)
                score = tl.dot(k5, q5, score)
                score = tl.dot(k6, q6, score)
                score = tl.dot(k7, q7, score)
            if K_SCALES == 1:
                ks_page = page * k_scale_page + head * k_scale_head
                ks_pair = 0
                if PAIRS:
                    ks_pair = (pair_page * k_scale_page + head * k_scale_head + pair_slot) // 2
                ks = load_plane(k_scale, ks_page, slot, ks_pair, shown, PAIRS)
                score = score * (ks * score_scale)[:, None]
                if K_ZERO:
                    kz = load_plane(k_zero, ks_page, slot, ks_pair, shown, PAIRS)
                    score += q_sum[None, :] * kz[:, None]
            else:
                score = score * score_scale
                if K_ZERO:
                    score += q_sum[None, :]
            if SOFTCAP:
                # tanh(x) = 1 - 2 / (1 + e^2x): exact at both ends.
                bent = tl.exp2(score * (2.0 * LOG2E / softcap))
                score = (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + bent))
            if V_SCALES == 1:
                vs_page = page * v_scale_page + head * v_scale_head
                vs_pair = 0
                if PAIRS:
                    vs_pair = (pair_page * v_scale_page + head * v_scale_head + pair_slot) // 2
                vs = load_plane(v_scale, vs_page, slot, vs_pair, shown, PAIRS)
                if V_ZERO:
                    vz = load_plane(v_zero, vs_page, slot, vs_pair, shown, PAIRS)
            if (key_start < all_low) | (key_start + TILE > all_high):
                seen = shown[:, None]
                if not FULL:
                    seen = seen & (key[:, None] <= seat[None, :])
                if WINDOW:
                    near = (key[:, None] > seat[None, :] - window) | (key < sink_tokens)[:, None]
                    seen = seen & near
                if SEGMENT != 0:
                    behind = (seat // PAGE)[None, :] - (key // PAGE)[:, None]
                    exact = ((behind >= 0) & (behind <= 1)) | (key < PAGE)[:, None]
                    seen = seen & (exact if SEGMENT == 2 else ~exact)
                score = tl.where(seen, score, float("-inf"))
                if V_SCALES == 1:
                    vs = tl.where(shown, vs, 0.0)
                    if V_ZERO:
                        vz = tl.where(shown, vz, 0.0)
            heavy = score
            if V_SCALES == 1:
                # The row's peak is that of p * v_scale: the product is at most 2^SHIFT.
                heavy = score + log2_fast(tl.maximum(vs, 1e-30))[:, None]
            new_top = tl.maximum(top, tl.max(heavy, 0))
            anchor = tl.where(new_top == float("-inf"), 0.0, new_top - SHIFT)
            shrink = tl.exp2(top - SHIFT - anchor)
            p = tl.exp2(score - anchor[None, :])
            weights = weights * shrink[None, :] + p
            if V_SCALES == 1:
                if V_ZERO:
                    offsets = offsets * shrink[None, :] + p * vz[:, None]
                p = p * vs[:, None]
            p = p.to(V_NUMBER)
            top = new_top
            v = tl.load(v_rows + v_word[:, None], v_mask, 0)
            if V_PARTS == 1:
                acc0 = tl.dot(v, p, acc0 * shrink[None, :])
            elif V_PARTS == 4:
                v0, v1, v2, v3 = unpack4(v, V_CODE, OLD)
                acc0 = tl.dot(v0, p, acc0 * shrink[None, :])
                acc1 = tl.dot(v1, p, acc1 * shrink[None, :])
                acc2 = tl.dot(v2, p, acc2 * shrink[None, :])
                acc3 = tl.dot(v3, p, acc3 * shrink[None, :])
            else:
                v0, v1, v2, v3, v4, v5, v6, v7 = unpack8(v)
                acc0 = tl.dot(v0, p, acc0 * shrink[None, :])
                acc1 = tl.dot(v1, p, acc1 * shrink[None, :])
                acc2 = tl.dot(v2, p, acc2 * shrink[None, :])
                acc3 = tl.dot(v3, p, acc3 * shrink[None, :])
                acc4 = tl.dot(v4, p, acc4 * shrink[None, :])
                acc5 = tl.dot(v5, p, acc5 * shrink[None, :])
                acc6 = tl.dot(v6, p, acc6 * shrink[None, :])
                acc7 = tl.dot(v7, p, acc7 * shrink[None, :])

        if last_tile > first_tile:
            complete = (first_tile == 0) & (last_tile == tiles)
            total = tl.sum(weights, 0)
            some = total != 0
            log_total = tl.log2(tl.where(some, total, 1.0))
            row_lse = tl.where(some, top - SHIFT + log_total, float("-inf"))
            ratio = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
            slot_id = 2 * program + (position != start).to(tl.int32)
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
                tl.store(lse + token_at * (kv_heads * GROUP) + q_head_at, row_lse * LN2, real)
            else:
                part_at = slot_id.to(tl.int64) * ROWS + row
                tl.store(part_lse + part_at, row_lse, real)
            if first_tile == 0:
                # Where the row's pieces are, for the merge: the first one's slot, -1 for none, and
                # the program that holds the last.
                cut = cuts + (request * kv_heads * ROW_TILES + item) * 2
                tl.store(cut, tl.where(complete, -1, slot_id))
                tl.store(cut + 1, (position + tiles - 1) // share)
            extra = tl.sum(offsets, 0) * ratio
            # What the sink left of the row's weight: 1 without one, 0 for a row that saw nothing.
            mass = total * ratio
            vs_static = v_scale + head * v_scale_head
            vz_static = v_zero + head * v_scale_head
            static: tl.constexpr = V_SCALES == 2
            static_zero: tl.constexpr = (V_SCALES == 2) & V_ZERO
            # Two destinations of two types: the result, or a float32 partial.
            if complete:
                to = out + token_at * out_token + q_head_at * out_head
                _store_parts(
                    to, acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7, real, ratio, mass, extra,
                    vs_static, vz_static, v_word, v_word4, v_word8, VALUE_DIM, V_PARTS, static,
                    static_zero, V_SHARED,
                )  # fmt: skip
            else:
                to_part = part_out + (slot_id.to(tl.int64) * ROWS + row) * VALUE_DIM
                _store_parts(
                    to_part, acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7, real, ratio, mass,
                    extra,
                    vs_static, vz_static, v_word, v_word4, v_word8, VALUE_DIM, V_PARTS, static,
                    static_zero, V_SHARED,
                )  # fmt: skip
        position += last_tile - first_tile
        if position - begins >= tiles * kv_heads * ROW_TILES:
            request += 1
            begins = position


@triton.jit
def _store_parts(
    to, acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7, real, ratio, mass, extra, v_scale, v_zero,
    v_word, v_word4, v_word8, VALUE_DIM: tl.constexpr, PARTS: tl.constexpr, STATIC: tl.constexpr,
    STATIC_ZERO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    _store_part(to, acc0, v_word * PARTS, real, ratio, mass, extra, v_scale, v_zero,
                VALUE_DIM, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
    if PARTS > 1:
        _store_part(to, acc1, v_word4 * PARTS + 1, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc2, v_word4 * PARTS + 2, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc3, v_word4 * PARTS + 3, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
    if PARTS > 4:
        _store_part(to, acc4, v_word8 * PARTS + 4, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc5, v_word8 * PARTS + 5, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc6, v_word8 * PARTS + 6, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc7, v_word8 * PARTS + 7, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
