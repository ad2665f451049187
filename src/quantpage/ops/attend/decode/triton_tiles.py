"""The tiles of keys that one piece of a row walks; see triton_kernel for the products."""

import triton
import triton.language as tl

from quantpage.ops.attend.decode.triton_parts import first_channel, load_queries, parts_of, width_of
from quantpage.ops.attend.decode.triton_planes import load_parts
from quantpage.ops.attend.decode.triton_share import keys_of_all, shown_keys
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS, EXACT_KEYS, exact_pairs
from quantpage.ops.triton.common import A_TOKEN, FP8, INT4, LOG2E, NONE, STATIC
from quantpage.ops.triton.planes import in_planes, plane_row
from quantpage.ops.triton.words import load_plane, log2_fast, unpack4, unpack8


@triton.jit
def walk_tiles(
    q, q_rows, real, seat, head, context, q_len, table, first_tile, last_tile,
    a_low, a_high, b_low, b_high, a_first, a_tiles, b_first,
    k_codes, v_codes, k_scale, v_scale, k_zero, v_zero, k_page, k_head, v_page, v_head,
    k_scale_page, k_scale_head, v_scale_page, v_scale_head, k_half, v_half,
    softmax_scale, softcap, window, sink_tokens, K_CODE: tl.constexpr, V_CODE: tl.constexpr,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, K_ZERO: tl.constexpr, V_ZERO: tl.constexpr,
    K_SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr, SOFTCAP: tl.constexpr, STAGES: tl.constexpr, OLD: tl.constexpr,
    PAIRS: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Tiles first_tile .. last_tile of those that the key ranges hold, in the kernel's names.

    Of each query row: its log2-sum-exp, what its outputs are to be multiplied by, the sum of its
    weights, and of what zeros of values add. Then the outputs, in eight strided parts, of which V's
    code may have fewer.
    """
    BIASED: tl.constexpr = K_CODE == INT4 or in_planes(K_CODE)
    K_PARTS: tl.constexpr = parts_of(K_CODE)
    V_PARTS: tl.constexpr = parts_of(V_CODE)
    K_WORDS: tl.constexpr = HEAD_DIM // K_PARTS
    V_WORDS: tl.constexpr = VALUE_DIM // V_PARTS
    K_ROW: tl.constexpr = plane_row(HEAD_DIM, K_CODE, 2) if in_planes(K_CODE) else K_WORDS
    V_ROW: tl.constexpr = plane_row(VALUE_DIM, V_CODE, 2) if in_planes(V_CODE) else V_WORDS
    K_WIDTH: tl.constexpr = width_of(HEAD_DIM, K_CODE)
    V_WIDTH: tl.constexpr = width_of(VALUE_DIM, V_CODE)
    # Widths of accumulators that this code does not have.
    V_WIDTH4: tl.constexpr = V_WIDTH if V_PARTS > 1 else 16
    V_WIDTH8: tl.constexpr = V_WIDTH if V_PARTS > 4 else 16
    V_NUMBER: tl.constexpr = v_codes.dtype.element_ty if V_CODE == NONE else tl.float16
    K_NUMBER: tl.constexpr = k_codes.dtype.element_ty if K_CODE == NONE else tl.float16
    SHIFT: tl.constexpr = 0.0 if tl.bfloat16 == V_NUMBER else 12.0
    lane = tl.arange(0, TILE)
    pair = tl.arange(0, TILE // 2)
    k_word = tl.arange(0, K_WIDTH)
    v_word = tl.arange(0, V_WIDTH)

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

    # Keys that every query of this request sees: tiles inside need no mask by row.
    first_seat = context - q_len
    all_low, all_high = keys_of_all(context, first_seat, window, PAGE, FULL, WINDOW, SEGMENT)
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

    total = tl.sum(weights, 0)
    some = total != 0
    log_total = tl.log2(tl.where(some, total, 1.0))
    row_lse = tl.where(some, top - SHIFT + log_total, float("-inf"))
    ratio = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    extra = tl.sum(offsets, 0)
    return row_lse, ratio, total, extra, acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7
