"""Attention under interval masks, straight from pages in portable Triton.

A program takes BM packed rows (a token and a query head of one kv_head) and the key tiles that the
planner listed for them: full ones run without mask code, partial ones load the mask's integers,
tiles on no list are not read. Short steps (decode, verification) cut each list into ``splits``
programs, whose results are merged by log-sum-exp.

flash/triton_parts says how codes and scales enter.
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
from quantpage.ops.attend.flash.triton_segments import BODY_KEYS, EXACT_KEYS, exact_pairs
from quantpage.ops.attend.interval.triton_plan import hidden_rows, visible_range
from quantpage.ops.triton.common import LOG2E, NONE, SEVERAL


@triton.jit
def _seen(
    mask,
    width,
    described,
    length,
    positions,
    keys,
    VECTORS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
):
    """[rows, keys]: which pairs the mask shows."""
    q = positions[:, None]
    k = keys[None, :]
    if RANGES == 0:
        lts, lte, uts, ute = hidden_rows(mask, width, length, keys, VECTORS, CAUSAL)
        if VECTORS == 4 or (VECTORS == 2 and CAUSAL):
            seen = (q < lts[None, :]) | (q >= lte[None, :])
        else:
            seen = q < lts[None, :]
        if CAUSAL:
            seen &= q >= k
        elif VECTORS == 4:
            seen &= (q < uts[None, :]) | (q >= ute[None, :])
        else:
            seen &= q >= ute[None, :]
    else:
        seen = (q < 0) & (k < 0)
        for slot in tl.static_range(RANGES + 1):
            start, end = visible_range(mask, described, length, positions, slot, RANGES)
            seen |= (k >= start[:, None]) & (k < end[:, None])
    return seen


class Listed(NamedTuple):
    """A query tile's list of key tiles, and the mask of its pairs."""

    visits: Any
    """Full tiles from the front, partial ones from the back."""
    capacity: Any
    mask: Any
    width: Any
    described: Any
    length: Any
    positions: Any
    valid: Any
    """Rows of the request."""
    context: Any
    PAGE: tl.constexpr
    VECTORS: tl.constexpr
    CAUSAL: tl.constexpr
    RANGES: tl.constexpr
    SEGMENT: tl.constexpr


@triton.jit
def _visit(
    rows, q, q_sum, k, v, table, first, step, begin, stop, listed, scoring, BN: tl.constexpr,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Visits begin..stop of the list, which are at first + step * visit."""
    for visit in tl.range(begin, stop, num_stages=STAGES):
        tile = tl.load(listed.visits + (first + step * visit))
        key0 = tile * BN
        keys = key0 + tl.arange(0, BN)
        shown = keys < listed.context
        page, slot, shown = find_rows(table, key0, keys, shown, listed.PAGE, BN, MASKED)
        seen = shown
        if MASKED:
            seen = _seen(
                listed.mask, listed.width, listed.described, listed.length, listed.positions, keys,
                listed.VECTORS, listed.CAUSAL, listed.RANGES,
            )  # fmt: skip
            seen &= shown[None, :] & listed.valid[:, None]
            near = exact_pairs(listed.positions[:, None], keys[None, :], listed.PAGE)
            if listed.SEGMENT == BODY_KEYS:
                seen &= ~near
            if listed.SEGMENT == EXACT_KEYS:
                seen &= near
        rows = attend_tile(rows, q, q_sum, k, v, page, slot, shown, seen, scoring, MASKED, CAREFUL)
    return rows


@triton.jit
def _attend_list(
    q_at, token, q_index, kv_heads, split, part, begin, stop, full_count, table, k, v, listed,
    scoring, out_ptr, lse_ptr, sinks_ptr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SINKS: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Visits begin..stop of a list for one kv_head.

    q_at: the rows' queries, of token and q_index. part: from one split's results to the next's.
    """
    q, q_sum = load_queries(q_at, listed.valid, k, OPERAND)
    sink = tl.full([BM], -float("inf"), tl.float32)
    sunk = 0.0
    if SINKS:
        # One key of the softmax: it enters one split.
        sink = tl.load(sinks_ptr + q_index).to(tl.float32) * LOG2E
        sink = tl.where(split == 0, sink, -float("inf"))
        sunk = tl.where(split == 0, 2.0**scoring.SHIFT, 0.0)
    full_end = tl.minimum(stop, full_count)
    rest, rest_end = tl.maximum(begin, full_count) - full_count, stop - full_count
    running = begin_rows(sink, sunk, BM, v.DP)
    # Full tiles from the front, partial ones from the back.
    running = _visit(
        running, q, q_sum, k, v, table, 0, 1, begin, full_end, listed, scoring, BN, False, False,
        STAGES,
    )  # fmt: skip
    running = _visit(
        running, q, q_sum, k, v, table, listed.capacity - 1, -1, rest, rest_end, listed, scoring,
        BN, True, False, 1,
    )  # fmt: skip
    if v.CODE == NONE or v.SCALED == SEVERAL:  # noqa: SIM102
        if spoiled(running):
            running = begin_rows(sink, sunk, BM, v.DP)
            for turn in range(2):
                running = _visit(
                    running, q, q_sum, k, v, table,
                    tl.where(turn == 0, 0, listed.capacity - 1), tl.where(turn == 0, 1, -1),
                    tl.where(turn == 0, begin, rest), tl.where(turn == 0, full_end, rest_end),
                    listed, scoring, BN, True, True, 1,
                )  # fmt: skip

    sink_mass = running.mass * 0.0
    if SINKS:
        sink_mass = tl.where(split == 0, tl.exp2(sink - running.top + scoring.SHIFT), 0.0)
    acc, lse = finish(running, sink_mass, v, scoring.SHIFT)
    at = split.to(tl.int64) * part + token.to(tl.int64) * (kv_heads * G) + q_index
    store_rows(out_ptr, lse_ptr, at, listed.valid, acc, lse, v)


@triton.jit(do_not_specialize=["kv_heads", "splits", "width", "capacity", "table_row", "part"])
def flash_mask_kernel(
    q_ptr,
    k_codes,
    k_scale,
    k_zero,
    v_codes,
    v_scale,
    v_zero,
    page_table,
    query_starts,
    context_lens,
    items,
    tiles,
    counts,
    mask,
    spans,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    kv_heads,
    splits,
    part,
    width,
    m_batch,
    m_head,
    capacity,
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
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PAGE: tl.constexpr,
    K_CODE: tl.constexpr,
    V_CODE: tl.constexpr,
    K_SCALED: tl.constexpr,
    V_SCALED: tl.constexpr,
    K_ZERO: tl.constexpr,
    V_ZERO: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    VECTORS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SHARED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SHIFT: tl.constexpr,
    OLD: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One (query tile, kv_head, split) a program; the last query tiles first, they see most."""
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    request = tl.load(items + index * 2)
    row0 = tl.load(items + index * 2 + 1)
    token0 = tl.load(query_starts + request)
    new = tl.load(query_starts + request + 1) - token0
    context = tl.load(context_lens + request)
    mask_head = (head if PER_HEAD else head * 0).to(tl.int64)
    list_at = index.to(tl.int64) * (kv_heads if PER_HEAD else 1) + mask_head
    full_count = tl.load(counts + list_at * 2)
    count = full_count + tl.load(counts + list_at * 2 + 1)
    share = tl.cdiv(count, splits)
    begin = tl.minimum(split * share, count)
    stop = tl.minimum(begin + share, count)
    visits = tiles + list_at * capacity
    span = spans + (0 if SHARED else request * 2)
    described = tl.load(span)
    length = tl.load(span + 1)
    mask += request.to(tl.int64) * m_batch + mask_head * m_head
    table = page_table + request.to(tl.int64) * table_row
    k_codes += head.to(tl.int64) * k_head
    v_codes += head.to(tl.int64) * v_head
    k_scale += head.to(tl.int64) * ks_head
    k_zero += head.to(tl.int64) * ks_head
    v_scale += head.to(tl.int64) * vs_head
    v_zero += head.to(tl.int64) * vs_head
    rows = row0 + tl.arange(0, BM)
    valid = rows < new * G
    positions = context - new + rows // G
    token = token0 + rows // G
    q_index = head * G + rows % G
    at = q_ptr + token.to(tl.int64) * q_token + q_index.to(tl.int64) * q_head
    _attend_list(
        at, token, q_index, kv_heads, split, part, begin, stop, full_count, table,
        Half(k_codes, k_scale, k_zero, k_page, ks_page, D, DP, K_CODE, K_SCALED, K_ZERO, K_GROUPS),
        Half(
            v_codes, v_scale, v_zero, v_page, vs_page, DV, DVP, V_CODE, V_SCALED, V_ZERO, V_GROUPS
        ),
        Listed(
            visits, capacity, mask, width, described, length, positions, valid, context, PAGE,
            VECTORS, CAUSAL, RANGES, SEGMENT,
        ),
        Scoring(scale, cap, SOFTCAP, SHIFT, OLD), out_ptr, lse_ptr, sinks_ptr, G, BM, BN, SINKS,
        STAGES, OPERAND,
    )  # fmt: skip
