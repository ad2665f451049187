"""Prefill straight from pages in portable Triton: codes are dequantized in registers, tile by tile.

A program takes BM rows of (token, query head of one kv_head) pairs and walks the keys that they may
see; flash/triton_parts says how codes and scales enter.

Keys come in two ranges, near the request's start (sink tokens, the first exact page) and up to the
query; tiles that every row sees whole are computed without a mask.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantpage.ops.attend.flash.triton_parts import (
    Half,
    Scoring,
    attend_tile,
    begin_rows,
    find_rows,
    finish,
    load_queries,
    spoiled,
    store_rows,
)
from quantpage.ops.attend.flash.triton_segments import (
    ALL_KEYS,
    BODY_KEYS,
    EXACT_KEYS,
    exact_pairs,
    near_page,
    near_pairs,
)
from quantpage.ops.attend.prefill.triton_work import load_item
from quantpage.ops.triton.common import LOG2E, NONE, SEVERAL


class Seen(NamedTuple):
    """What the rows of a work item see, causal or full."""

    positions: Any
    limit: Any
    """End of each row's keys."""
    low: Any
    """First key of each row's window."""
    sink_tokens: Any
    PAGE: tl.constexpr
    WINDOW: tl.constexpr
    CAUSAL: tl.constexpr
    SEGMENT: tl.constexpr


@triton.jit
def _tiles(
    rows, q, q_sum, k, v, table, span, seen_by, scoring, BN: tl.constexpr, SLOTS: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Key tiles from span[0] up to span[1]; of their keys span[2]..span[3] exist."""
    first, last, low_key, high_key = span
    # A span begins and ends with what its first and its last row see. What windows and segments
    # leave out between them may be hidden from all.
    SEEN_BY_SOME: tl.constexpr = seen_by.SEGMENT == ALL_KEYS or (
        not seen_by.WINDOW and (seen_by.CAUSAL or seen_by.SEGMENT == EXACT_KEYS)
    )
    for key0 in tl.range(first, last, BN, num_stages=STAGES):
        keys = key0 + tl.arange(0, BN)
        shown = (keys >= low_key) & (keys < high_key)
        page, slot, shown = find_rows(table, key0, keys, shown, SLOTS, BN, MASKED)
        seen = shown
        if MASKED:
            column = keys[None, :]
            seen = (column < seen_by.limit[:, None]) & shown[None, :]
            if seen_by.WINDOW:
                seen &= (column >= seen_by.low[:, None]) | (column < seen_by.sink_tokens)
            if seen_by.SEGMENT == EXACT_KEYS:
                seen &= exact_pairs(seen_by.positions[:, None], column, seen_by.PAGE)
            if seen_by.SEGMENT == BODY_KEYS and not seen_by.CAUSAL:
                seen &= ~near_pairs(seen_by.positions[:, None], column, seen_by.PAGE)
        rows = attend_tile(
            rows, q, q_sum, k, v, page, slot, shown, seen, scoring, MASKED, CAREFUL, SEEN_BY_SOME
        )  # fmt: skip
    return rows


@triton.jit
def _attend_item(
    q_ptr, q_token, q_head, q_heads, head, item, part_at, table, k, v, scoring, out_ptr, lse_ptr,
    sinks_ptr, window, sink_tokens, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SLOTS: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, CAUSAL: tl.constexpr,
    SEGMENT: tl.constexpr, SINKS: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """A work item for one kv_head.

    head: of the layer. part_at: where the results of this part of the keys begin.
    """
    new, position, row0, context = item.new, item.position, item.row, item.end
    rows = row0 + tl.arange(0, BM)
    token = item.token + rows // G
    q_index = head * G + rows % G
    at = q_ptr + token.to(tl.int64) * q_token + q_index.to(tl.int64) * q_head
    q, q_sum = load_queries(at, rows < new * G, k, OPERAND)

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
        near_low = item.base
        if WINDOW:
            near_low = tl.where(sink_tokens > 0, 0, tl.maximum(first - window + 1, 0))
        near_low = tl.minimum(near_low, PAGE)
        near_high = tl.maximum(tl.minimum(PAGE, high), near_low)
        near_start = tl.maximum(near_page(first, PAGE), 0) * PAGE
        from_key = tl.maximum(from_key, near_start)
        if WINDOW:
            # Sink tokens behind the first page, in a near page and before the window.
            from_key = tl.where(sink_tokens > tl.maximum(near_start, PAGE), near_start, from_key)
        high = tl.minimum(high, (last // PAGE + 1) * PAGE)
    from_key = tl.maximum(from_key, near_high)
    if not WINDOW:
        # A part of the keys; with a window, base is only where a workspace begins.
        from_key = tl.maximum(from_key, item.base)
    high = tl.maximum(high, from_key)
    start = from_key // BN * BN
    # Tiles start..whole_start and whole_end..high are masked, those between are seen by every row.
    whole_start = tl.maximum((tl.maximum(whole_from, from_key) + BN - 1) // BN * BN, start)
    whole_end = tl.maximum(first_limit // BN * BN, whole_start)
    MASKED: tl.constexpr = SEGMENT == EXACT_KEYS or (SEGMENT == BODY_KEYS and not CAUSAL)
    if MASKED:
        whole_start = high

    sink = tl.full([BM], -float("inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + q_index).to(tl.float32) * LOG2E
    NEAR: tl.constexpr = SEGMENT == EXACT_KEYS or WINDOW
    FIRST: tl.constexpr = SEGMENT != ALL_KEYS or WINDOW
    running = begin_rows(sink, 2.0**scoring.SHIFT if SINKS else 0.0, BM, v.DP)
    # Parts: near keys, masked tiles, whole tiles, masked tiles. Each is compiled by itself, so that
    # whole tiles, which are nearly all of a long context, have neither mask nor its registers.
    for part in tl.static_range(4):
        if part == 0:
            span = near_low // BN * BN, near_high, near_low, near_high
        elif part == 1:
            span = start, tl.minimum(whole_start, high), from_key, high
        elif part == 2:
            span = whole_start, whole_end, from_key, high
        else:
            span = tl.maximum(whole_end, start), high, from_key, high
        if (part == 0 and NEAR) or (part == 1 and FIRST) or (part >= 2 and not MASKED):
            running = _tiles(
                running, q, q_sum, k, v, table, span,
                Seen(positions, limit, low, sink_tokens, PAGE, WINDOW, CAUSAL, SEGMENT), scoring,
                BN, SLOTS, part != 2, False, STAGES if part == 2 else 1,
            )  # fmt: skip
    if v.CODE == NONE or v.SCALED == SEVERAL:  # noqa: SIM102
        if spoiled(running):
            running = begin_rows(sink, 2.0**scoring.SHIFT if SINKS else 0.0, BM, v.DP)
            for turn in range(2):
                tiles = (
                    tl.where(turn == 0, near_low // BN * BN, start),
                    tl.where(turn == 0, near_high, high),
                    tl.where(turn == 0, near_low, from_key),
                    tl.where(turn == 0, near_high, high),
                )
                running = _tiles(
                    running, q, q_sum, k, v, table, tiles,
                    Seen(positions, limit, low, sink_tokens, PAGE, WINDOW, CAUSAL, SEGMENT),
                    scoring, BN, SLOTS, True, True, 1,
                )  # fmt: skip

    sink_mass = running.mass * 0.0
    if SINKS:
        sink_mass = tl.exp2(sink - running.top + scoring.SHIFT)
    acc, lse = finish(running, sink_mass, v, scoring.SHIFT)
    at = token.to(tl.int64) * q_heads + q_index + part_at
    store_rows(out_ptr, lse_ptr, at, rows < new * G, acc, lse, v)


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
    item = load_item(work, tile // heads)
    part_at = item.part.to(tl.int64) * part_rows
    table = page_table + item.request.to(tl.int64) * table_row
    k_codes += head.to(tl.int64) * k_head
    v_codes += head.to(tl.int64) * v_head
    k_scale += head.to(tl.int64) * ks_head
    k_zero += head.to(tl.int64) * ks_head
    v_scale += head.to(tl.int64) * vs_head
    v_zero += head.to(tl.int64) * vs_head
    _attend_item(
        q_ptr, q_token, q_head, q_heads, head0 + head, item, part_at, table,
        Half(k_codes, k_scale, k_zero, k_page, ks_page, D, DP, K_CODE, K_SCALED, K_ZERO, K_GROUPS),
        Half(
            v_codes, v_scale, v_zero, v_page, vs_page, DV, DVP, V_CODE, V_SCALED, V_ZERO, V_GROUPS
        ),
        Scoring(scale, cap, SOFTCAP, SHIFT, OLD), out_ptr, lse_ptr, sinks_ptr, window, sink_tokens,
        G, BM, BN, SLOTS, PAGE, WINDOW, CAUSAL, SEGMENT, SINKS, STAGES, OPERAND,
    )  # fmt: skip
