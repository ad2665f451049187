"""Decode: split-KV attention over quantized pages for 1 to 16 query tokens a request.

One launch of a fixed grid walks equal shares of all tiles (triton_share); rows that were cut are
joined by it (triton_pieces) or by a second (triton_merge). Codes are read as 32-bit words
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

from quantpage.ops.attend.decode.triton_parts import (
    first_channel,
    load_part,
    load_queries,
    parts_of,
    store_parts,
)
from quantpage.ops.attend.decode.triton_pieces import finish_empty, join_cut
from quantpage.ops.attend.decode.triton_planes import half_of, load_parts
from quantpage.ops.attend.decode.triton_share import (
    key_ranges,
    keys_of_all,
    my_share,
    request_tiles,
    row_programs,
    shown_keys,
    tile_ranges,
)
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS, EXACT_KEYS, exact_pairs
from quantpage.ops.triton.common import A_TOKEN, FP8, INT4, LN2, LOG2E, NONE, STATIC
from quantpage.ops.triton.planes import in_planes, plane_row
from quantpage.ops.triton.words import load_plane, log2_fast, unpack4, unpack8


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
    earlier_out,
    earlier_lse,
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
    EARLIER: tl.constexpr,
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
    tile. EARLIER: float32 results of other keys enter; values have no static scales. GATHER: pieces
    that are joined at once; 0: another launch joins. WHOLE: programs take whole rows, none is cut.
    HIDES: values are 16-bit numbers, and a query may see one that another does not.
    """
    program = tl.program_id(0)
    if OVERLAP:
        # The launches before and after overlap with this one: wait for what the first wrote, let
        # the next one be set up.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if WHOLE:
        start, end = program, requests * kv_heads * ROW_TILES
        share, request, begins = 1, program, 0
        even = False
    else:
        start, end, share, request, begins, even = my_share(
            query_starts, context_lens, requests, kv_heads * ROW_TILES, min_tiles, window,
            sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK,
        )  # fmt: skip
    BIASED: tl.constexpr = K_CODE == INT4 or in_planes(K_CODE)
    K_PARTS: tl.constexpr = parts_of(K_CODE)
    V_PARTS: tl.constexpr = parts_of(V_CODE)
    K_WORDS: tl.constexpr = HEAD_DIM // K_PARTS
    V_WORDS: tl.constexpr = VALUE_DIM // V_PARTS
    K_ROW: tl.constexpr = plane_row(HEAD_DIM, K_CODE, 2) if in_planes(K_CODE) else K_WORDS
    V_ROW: tl.constexpr = plane_row(VALUE_DIM, V_CODE, 2) if in_planes(V_CODE) else V_WORDS
    # Products need an inner and an outer width of at least 16.
    K_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(K_WORDS))
    V_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(V_WORDS))
    # Widths of accumulators that this code does not have.
    V_WIDTH4: tl.constexpr = V_WIDTH if V_PARTS > 1 else 16
    V_WIDTH8: tl.constexpr = V_WIDTH if V_PARTS > 4 else 16
    V_NUMBER: tl.constexpr = v_codes.dtype.element_ty if V_CODE == NONE else tl.float16
    K_NUMBER: tl.constexpr = k_codes.dtype.element_ty if K_CODE == NONE else tl.float16
    SHIFT: tl.constexpr = 0.0 if tl.bfloat16 == V_NUMBER else 12.0
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, TILE)
    pair = tl.arange(0, TILE // 2)
    k_word = tl.arange(0, K_WIDTH)
    v_word = tl.arange(0, V_WIDTH)
    v_word4 = tl.arange(0, V_WIDTH4)
    v_word8 = tl.arange(0, V_WIDTH8)
    k_half = k_word
    v_half = v_word
    if in_planes(K_CODE):
        k_half = half_of(k_codes, K_WIDTH, requests < 0)
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
        q0, q1, q2, q3, q4, q5, q6, q7, unit, q_sum, bias = load_queries(
            q, q_rows, real, k_static, kz_static,
            first_channel(k_word, HEAD_DIM, K_WIDTH, K_CODE), HEAD_DIM, K_CODE, K_PARTS,
            K_SCALES == STATIC, (K_SCALES == STATIC) & K_ZERO, K_SHARED, K_NUMBER,
        )  # fmt: skip
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

        if EARLIER:
            # What other keys gave is one key that the row's first piece begins with.
            begun = real & (first_tile == 0)
            earlier_at = token_at * (kv_heads * GROUP) + q_head_at
            top = tl.load(earlier_lse + earlier_at, begun, float("-inf")) * LOG2E
            begun = begun & (top != float("-inf"))
            SHARE: tl.constexpr = 4096.0 if SHIFT > 0 else 1.0
            weights = tl.where((lane == 0)[:, None] & begun[None, :], SHARE, 0.0)
            part = earlier_out + earlier_at * VALUE_DIM
            acc0 = SHARE * load_part(part, v_word, V_WIDTH, 0, begun, VALUE_DIM, V_CODE)
            if V_PARTS > 1:
                acc1 = SHARE * load_part(part, v_word4, V_WIDTH, 1, begun, VALUE_DIM, V_CODE)
                acc2 = SHARE * load_part(part, v_word4, V_WIDTH, 2, begun, VALUE_DIM, V_CODE)
                acc3 = SHARE * load_part(part, v_word4, V_WIDTH, 3, begun, VALUE_DIM, V_CODE)
            if V_PARTS > 4:
                acc4 = SHARE * load_part(part, v_word8, V_WIDTH, 4, begun, VALUE_DIM, V_CODE)
                acc5 = SHARE * load_part(part, v_word8, V_WIDTH, 5, begun, VALUE_DIM, V_CODE)
                acc6 = SHARE * load_part(part, v_word8, V_WIDTH, 6, begun, VALUE_DIM, V_CODE)
                acc7 = SHARE * load_part(part, v_word8, V_WIDTH, 7, begun, VALUE_DIM, V_CODE)

        # Keys that every query of this request sees: tiles inside need no mask by row.
        first_seat = context - q_len
        all_low, all_high = keys_of_all(context, first_seat, window, PAGE, FULL, WINDOW, SEGMENT)
        table = page_table + request.to(tl.int64) * table_row
        k_base = k_codes + head * k_head
        v_base = v_codes + head * v_head
        for t in tl.range(first_tile, last_tile, num_stages=STAGES):
            tile = b_first + t
            if WINDOW or SEGMENT != ALL_KEYS:
                tile = tl.where(t < a_tiles, a_first + t, b_first + t - a_tiles)
            key_start = tile * TILE
            key = key_start + lane
            shown = shown_keys(
                key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens, WINDOW, SEGMENT
            )
            if PAGE >= TILE:
                page = tl.load(table + key_start // PAGE).to(tl.int64)
                slot = key_start % PAGE + lane
                k_rows = k_base + page * k_page + slot[:, None] * K_ROW
                v_rows = v_base + page * v_page + slot[None, :] * V_ROW
                pair_slot = key_start % PAGE + 2 * pair
                pair_page = page
            else:
                page = tl.load(table + key // PAGE, shown, 0).to(tl.int64)
                slot = key % PAGE
                k_rows = k_base + (page * k_page + slot * K_ROW)[:, None]
                v_rows = v_base + (page * v_page + slot * V_ROW)[None, :]
                if PAIRS:
                    pair_key = key_start + 2 * pair
                    pair_shown = shown_keys(
                        pair_key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens,
                        WINDOW, SEGMENT,
                    ) | shown_keys(
                        pair_key + 1, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens,
                        WINDOW, SEGMENT,
                    )  # fmt: skip
                    pair_page = tl.load(table + pair_key // PAGE, pair_shown, 0).to(tl.int64)
                    pair_slot = pair_key % PAGE
            # Scores are selected and integer codes are finite: only floats need the mask.
            k_mask = (k_word < K_WORDS)[None, :]
            v_mask = (v_word < V_WORDS)[:, None]
            if V_CODE == NONE or V_CODE == FP8:  # noqa: SIM109 - constants of the compiler
                v_mask = v_mask & shown[None, :]
            if not in_planes(K_CODE):
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
                if in_planes(K_CODE):
                    k0, k1, k2, k3, k4, k5, k6, k7 = load_parts(
                        k_rows, k_half, HEAD_DIM, K_WIDTH, K_CODE, BIASED, 1
                    )
                else:
                    k0, k1, k2, k3, k4, k5, k6, k7 = unpack8(k, BIASED)
                if BIASED:
                    score = tl.broadcast_to(-bias[None, :], [TILE, ROWS])
                    score = tl.dot(k0, q0, score)
                else:
                    score = tl.dot(k0, q0)
                score = tl.dot(k1, q1, score)
                score = tl.dot(k2, q2, score)
                score = tl.dot(k3, q3, score)
                score = tl.dot(k4, q4, score)
                score = tl.dot(k5, q5, score)
                score = tl.dot(k6, q6, score)
                score = tl.dot(k7, q7, score)
            if K_SCALES == A_TOKEN:
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
            if V_SCALES == A_TOKEN:
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
                if SEGMENT != ALL_KEYS:
                    exact = exact_pairs(seat[None, :], key[:, None], PAGE)
                    seen = seen & (exact if SEGMENT == EXACT_KEYS else ~exact)
                score = tl.where(seen, score, float("-inf"))
                if V_SCALES == A_TOKEN:
                    # Where a key is hidden p is 0: what it is multiplied by has to be finite.
                    vs = tl.where(shown & (vs < float("inf")), vs, 0.0)
                    if V_ZERO:
                        vz = tl.where(shown & (tl.abs(vz) < float("inf")), vz, 0.0)
            heavy = score
            if V_SCALES == A_TOKEN:
                # The row's peak is that of p * v_scale: the product is at most 2^SHIFT.
                heavy = score + log2_fast(tl.maximum(vs, 1e-30))[:, None]
            new_top = tl.maximum(top, tl.max(heavy, 0))
            anchor = tl.where(new_top == float("-inf"), 0.0, new_top - SHIFT)
            shrink = tl.exp2(top - SHIFT - anchor)
            p = tl.exp2(score - anchor[None, :])
            weights = weights * shrink[None, :] + p
            if V_SCALES == A_TOKEN:
                if V_ZERO:
                    offsets = offsets * shrink[None, :] + p * vz[:, None]
                p = p * vs[:, None]
            top = new_top
            if not in_planes(V_CODE):
                v = tl.load(v_rows + v_word[:, None], v_mask, 0)
            if HIDES:
                # A value that is not finite reaches the queries that see it, through their own
                # weight of it: the product would take it to all of them, as 0 times NaN is NaN.
                fine = tl.abs(v.to(tl.float32)) < float("inf")
                bad = tl.max(fine.to(tl.int32) ^ 1, 0) > 0
                v = tl.where(bad[None, :], 0.0, v)
                p = tl.where(bad[:, None] & (p != 0.0), float("nan"), p)
            p = p.to(V_NUMBER)
            if V_PARTS == 1:
                acc0 = tl.dot(v, p, acc0 * shrink[None, :])
            elif V_PARTS == 4:
                v0, v1, v2, v3 = unpack4(v, V_CODE, OLD)
                acc0 = tl.dot(v0, p, acc0 * shrink[None, :])
                acc1 = tl.dot(v1, p, acc1 * shrink[None, :])
                acc2 = tl.dot(v2, p, acc2 * shrink[None, :])
                acc3 = tl.dot(v3, p, acc3 * shrink[None, :])
            else:
                if in_planes(V_CODE):
                    v0, v1, v2, v3, v4, v5, v6, v7 = load_parts(
                        v_rows, v_half, VALUE_DIM, V_WIDTH, V_CODE, False, 0
                    )
                else:
                    v0, v1, v2, v3, v4, v5, v6, v7 = unpack8(v, False)
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
                if lse is not None:
                    at = lse + token_at * (kv_heads * GROUP) + q_head_at
                    tl.store(at, row_lse * LN2, real)
            else:
                part_at = slot_id.to(tl.int64) * ROWS + row
                tl.store(part_lse + part_at, row_lse, real)
            if GATHER == 0 and not WHOLE and first_tile == 0:
                # Where the row's pieces are, for the merge: the first one's slot, -1 for none, and
                # the program that holds the last.
                cut = cuts + (request * kv_heads * ROW_TILES + item) * 2
                tl.store(cut, tl.where(complete, -1, slot_id))
                _, last, _ = row_programs(program, position, position, tiles, share, even)
                tl.store(cut + 1, last)
            extra = tl.sum(offsets, 0) * ratio
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
                        program, position, position - first_tile, tiles, share, even
                    )
                    join_cut(
                        cuts, part_out, part_lse, sinks, out, lse, program,
                        request * kv_heads * ROW_TILES + item, first, last, slot,
                        requests * kv_heads * ROW_TILES,
                        tl.minimum(ROWS, q_len * GROUP - row_first), row_first, item // ROW_TILES,
                        q_start, kv_heads, out_token, out_head, GROUP, ROWS, VALUE_DIM, SINKS,
                        GATHER,
                    )  # fmt: skip
        if WHOLE:
            position += tl.num_programs(0)
        else:
            position += last_tile - first_tile
            if position - begins >= tiles * kv_heads * ROW_TILES:
                request += 1
                begins = position
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
