"""Prefill straight from pages in portable Triton: codes are dequantized in registers, tile by tile.

A program takes BM rows of (token, query head of one kv_head) pairs and walks the keys that they may
see; flash/triton_parts says how codes and scales enter.

Keys come in two ranges, near the request's start (sink tokens, the first exact page) and up to the
query; tiles that every row sees whole are computed without a mask.
"""

import triton
import triton.language as tl

from quantpage.ops.attend.flash.triton_parts import accumulate, finish, load_queries, scores
from quantpage.ops.attend.triton_segments import (
    ALL_KEYS,
    BODY_KEYS,
    EXACT_KEYS,
    exact_pairs,
    near_page,
    near_pairs,
)
from quantpage.ops.triton.common import INT4, LOG2E, Constant

WORK_FIELDS = Constant(9)
"""int32 a work item: prefill/plan.WORK_FIELDS names them."""
# SEGMENT: 0 all, 1 body, 2 exact. K_SCALED, V_SCALED: flash/triton_parts.


@triton.jit
def _tiles(
    acc,
    m,
    mass,
    zeros,
    q,
    q_sum,
    positions,
    limit,
    low,
    first,
    last,
    low_key,
    high_key,
    table,
    k_codes,
    k_scale,
    k_zero,
    v_codes,
    v_scale,
    v_zero,
    k_page,
    v_page,
    ks_page,
    vs_page,
    scale,
    cap,
    sink_tokens,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
    K_CODE: tl.constexpr,
    V_CODE: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_ZERO: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHIFT: tl.constexpr,
    OLD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Key tiles from ``first`` up to ``last``; of their keys low_key..high_key exist.

    Pointers are of one kv_head; k_page and the like are strides of pages.
    """
    K_ROW: tl.constexpr = D // 2 if K_CODE == INT4 else D
    V_ROW: tl.constexpr = DV // 2 if V_CODE == INT4 else DV
    for key0 in tl.range(first, last, BN, num_stages=STAGES):
        keys = key0 + tl.arange(0, BN)
        shown = (keys >= low_key) & (keys < high_key)
        if SLOTS % BN == 0:
            page = tl.load(table + key0 // SLOTS).to(tl.int64)
            slot = key0 % SLOTS + tl.arange(0, BN)
        elif MASKED:
            page = tl.load(table + keys // SLOTS, shown, -1).to(tl.int64)
            slot = keys % SLOTS
        else:
            page = tl.load(table + keys // SLOTS).to(tl.int64)
            slot = keys % SLOTS
        seen = shown
        if MASKED:
            # -1: an exact page that is not kept.
            shown = shown & (page >= 0)
            page = tl.maximum(page, 0)
            column = keys[None, :]
            seen = (column < limit[:, None]) & shown[None, :]
            if WINDOW:
                seen &= (column >= low[:, None]) | (column < sink_tokens)
            if SEGMENT == EXACT_KEYS:
                seen &= exact_pairs(positions[:, None], column, PAGE)
            if SEGMENT == BODY_KEYS and not CAUSAL:
                seen &= ~near_pairs(positions[:, None], column, PAGE)
            # A slot that no row sees may hold NaN: it is not loaded.
            shown = tl.max(seen.to(tl.int32), 0) > 0
        s, rest = scores(
            q, q_sum, k_codes, k_scale, k_zero, page * k_page + slot * K_ROW,
            page * ks_page + slot * K_GROUPS, shown, scale, cap, D, DP, K_CODE, K_SCALED, K_ZERO,
            K_GROUPS, MASKED, SOFTCAP, OLD,
        )  # fmt: skip
        if MASKED:
            s = tl.where(seen, s, -float("inf"))
        acc, m, mass, zeros = accumulate(
            acc, m, mass, zeros, s, rest, v_codes, v_scale, v_zero, page * v_page + slot * V_ROW,
            page * vs_page + slot * V_GROUPS, shown, seen, DV, DVP, V_CODE, V_SCALED, V_ZERO,
            V_GROUPS, MASKED, SHIFT, OLD,
        )  # fmt: skip
    return acc, m, mass, zeros


@triton.jit(do_not_specialize=["heads", "head0", "part_rows", "window", "sink_tokens", "table_row"])
def prefill_pages_kernel(
    q_ptr,
    k_codes,
    k_scale,
    k_zero,
    v_codes,
    v_scale,
    v_zero,
    page_table,
    order,
    work,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    heads,
    head0,
    q_heads,
    part_rows,
    q_token,
    q_head,
    table_row,
    k_page,
    k_head,
    v_page,
    v_head,
    ks_page,
    ks_head,
    vs_page,
    vs_head,
    scale,
    cap,
    window,
    sink_tokens,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
    K_CODE: tl.constexpr,
    V_CODE: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_ZERO: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEGMENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SHIFT: tl.constexpr,
    OLD: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One program a (work item, kv_head); see prefill/plan for both tables."""
    tile = tl.load(order + tl.program_id(0))
    head = tile % heads
    item = work + tile // heads * WORK_FIELDS
    token0 = tl.load(item)
    new = tl.load(item + 1)
    position = tl.load(item + 2)
    row0 = tl.load(item + 3)
    base = tl.load(item + 5)
    context = tl.load(item + 6)
    request = tl.load(item + 7)
    part_at = tl.load(item + 8).to(tl.int64) * part_rows
    table = page_table + request.to(tl.int64) * table_row
    k_codes += head.to(tl.int64) * k_head
    v_codes += head.to(tl.int64) * v_head
    k_scale += head.to(tl.int64) * ks_head
    k_zero += head.to(tl.int64) * ks_head
    v_scale += head.to(tl.int64) * vs_head
    v_zero += head.to(tl.int64) * vs_head

    rows = row0 + tl.arange(0, BM)
    token = token0 + rows // G
    q_index = (head0 + head) * G + rows % G
    at = q_ptr + token.to(tl.int64) * q_token + q_index.to(tl.int64) * q_head
    q, q_sum = load_queries(
        at, rows < new * G, k_scale, k_zero, D, DP, K_SCALED, K_ZERO, K_GROUPS, OPERAND
    )

    positions = position + rows // G
    first = position + row0 // G
    last = position + tl.minimum(row0 + BM - 1, new * G - 1) // G
    limit = positions * 0 + context
    first_limit = context
    high = context
    if CAUSAL:
        if SEGMENT == BODY_KEYS:
            limit = tl.minimum(limit, tl.maximum(near_page(positions, PAGE), 0) * PAGE)
            first_limit = tl.minimum(context, tl.maximum(near_page(first, PAGE), 0) * PAGE)
            high = tl.minimum(context, tl.maximum(near_page(last, PAGE), 0) * PAGE)
        else:
            limit = tl.minimum(limit, positions + 1)
            first_limit = tl.minimum(context, first + 1)
            high = tl.minimum(context, last + 1)
    # Rows past the request see nothing.
    limit = tl.where(rows < new * G, limit, 0)
    low = positions - window + 1
    near_low = 0
    near_high = 0
    from_key = 0
    whole_from = 0
    if WINDOW:
        near_high = tl.minimum(sink_tokens, high)
        from_key = tl.maximum(first - window + 1, 0)
        whole_from = last - window + 1
    if SEGMENT == BODY_KEYS:
        near_low = PAGE
        from_key = tl.maximum(from_key, PAGE)
        whole_from = tl.maximum(whole_from, PAGE)
    if SEGMENT == EXACT_KEYS:
        # The first page: what some row's window shows of it, or what a part of the keys has.
        near_low = base
        if WINDOW:
            near_low = tl.where(sink_tokens > 0, 0, tl.maximum(first - window + 1, 0))
        near_low = tl.minimum(near_low, PAGE)
        near_high = tl.maximum(tl.minimum(PAGE, high), near_low)
        from_key = tl.maximum(from_key, tl.maximum(near_page(first, PAGE), 0) * PAGE)
        high = tl.minimum(high, (last // PAGE + 1) * PAGE)
    from_key = tl.maximum(from_key, near_high)
    if not WINDOW:
        # A part of the keys; with a window, base is only where a workspace begins.
        from_key = tl.maximum(from_key, base)
    high = tl.maximum(high, from_key)
    start = from_key // BN * BN
    # Tiles start..whole_start and whole_end..high are masked, those between are seen by every row.
    whole_start = tl.maximum((tl.maximum(whole_from, from_key) + BN - 1) // BN * BN, start)
    whole_end = tl.maximum(first_limit // BN * BN, whole_start)
    if SEGMENT == EXACT_KEYS or (SEGMENT == BODY_KEYS and not CAUSAL):
        whole_start = tl.maximum((high + BN - 1) // BN * BN, start)
        whole_end = whole_start

    m = tl.full([BM], -float("inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    zeros = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DVP], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + q_index).to(tl.float32) * LOG2E
        m = sink
        mass = tl.full([BM], 2.0**SHIFT, tl.float32)
    NEAR: tl.constexpr = SEGMENT == EXACT_KEYS or WINDOW
    # Parts: near keys, masked tiles, whole tiles, masked tiles.
    for part in tl.static_range(4):
        if part == 0:
            begin, end, exists, until = near_low // BN * BN, near_high, near_low, near_high
        elif part == 1:
            begin, end, exists, until = start, tl.minimum(whole_start, high), from_key, high
        elif part == 2:
            begin, end, exists, until = whole_start, whole_end, from_key, high
        else:
            begin, end, exists, until = tl.maximum(whole_end, start), high, from_key, high
        if (part == 1 and (WINDOW or SEGMENT != ALL_KEYS)) or (part == 0 and NEAR) or part >= 2:
            acc, m, mass, zeros = _tiles(
                acc,
                m,
                mass,
                zeros,
                q,
                q_sum,
                positions,
                limit,
                low,
                begin,
                end,
                exists,
                until,
                table,
                k_codes,
                k_scale,
                k_zero,
                v_codes,
                v_scale,
                v_zero,
                k_page,
                v_page,
                ks_page,
                vs_page,
                scale,
                cap,
                sink_tokens,
                D,
                DV,
                DP,
                DVP,
                BN,
                SLOTS,
                PAGE,
                K_CODE,
                V_CODE,
                K_SCALED,
                V_SCALED,
                K_ZERO,
                V_ZERO,
                K_GROUPS,
                V_GROUPS,
                part != 2,
                WINDOW,
                CAUSAL,
                SEGMENT,
                SOFTCAP,
                SHIFT,
                OLD,
                STAGES if part == 2 else 1,
            )

    sink_mass = mass * 0.0
    if SINKS:
        sink_mass = tl.exp2(sink - m + SHIFT)
    acc, lse = finish(
        acc, m, mass, zeros, sink_mass, v_scale, v_zero, DV, DVP, V_SCALED, V_ZERO, V_GROUPS, SHIFT
    )
    channel = tl.arange(0, DVP)
    at = token.to(tl.int64) * q_heads + q_index + part_at
    keep = rows < new * G
    to = out_ptr + at[:, None] * DV + channel[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), keep[:, None] & (channel < DV)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + at, lse, keep)
