"""Attention under interval masks, straight from pages in portable Triton.

A program takes BM packed rows (a token and a query head of one kv_head) and the key tiles that the
planner listed for them: full ones run without mask code, partial ones load the mask's integers,
tiles on no list are not read. Short steps (decode, verification) cut each list into ``splits``
programs, whose results are merged by log-sum-exp.

flash/triton_parts says how codes and scales enter.
"""

import triton
import triton.language as tl

from quantpage.ops.attend.flash.triton_parts import accumulate, finish, load_queries, scores
from quantpage.ops.attend.interval.triton_plan import hidden_rows, visible_range
from quantpage.ops.attend.triton_segments import BODY_KEYS, EXACT_KEYS, exact_pairs
from quantpage.ops.triton.common import INT4, LOG2E


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


@triton.jit
def _visit(
    acc,
    m,
    mass,
    zeros,
    q,
    q_sum,
    positions,
    valid,
    context,
    begin,
    stop,
    visits,
    capacity,
    mask,
    width,
    described,
    length,
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
    D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
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
    MASKED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SHIFT: tl.constexpr,
    OLD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Visits begin..stop of the list: full tiles from its front, partial ones from its back."""
    K_ROW: tl.constexpr = D // 2 if K_CODE == INT4 else D
    V_ROW: tl.constexpr = DV // 2 if V_CODE == INT4 else DV
    for visit in tl.range(begin, stop, num_stages=STAGES):
        tile = tl.load(visits + (capacity - 1 - visit if MASKED else visit))
        keys = tile * BN + tl.arange(0, BN)
        shown = keys < context
        if PAGE % BN == 0:
            page = tl.load(table + tile * BN // PAGE).to(tl.int64)
            slot = tile * BN % PAGE + tl.arange(0, BN)
        elif MASKED:
            page = tl.load(table + keys // PAGE, shown, -1).to(tl.int64)
            slot = keys % PAGE
        else:
            page = tl.load(table + keys // PAGE).to(tl.int64)
            slot = keys % PAGE
        seen = shown
        if MASKED:
            # -1: an exact page that is not kept.
            shown = shown & (page >= 0)
            page = tl.maximum(page, 0)
            seen = _seen(mask, width, described, length, positions, keys, VECTORS, CAUSAL, RANGES)
            seen &= shown[None, :] & valid[:, None]
            near = exact_pairs(positions[:, None], keys[None, :], PAGE)
            if SEGMENT == BODY_KEYS:
                seen &= ~near
            if SEGMENT == EXACT_KEYS:
                seen &= near
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
    q, q_sum = load_queries(at, valid, k_scale, k_zero, D, DP, K_SCALED, K_ZERO, K_GROUPS, OPERAND)

    m = tl.full([BM], -float("inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    zeros = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DVP], tl.float32)
    if SINKS:
        # One key of the softmax: it enters one split.
        sink = tl.load(sinks_ptr + q_index).to(tl.float32) * LOG2E
        sink = tl.where(split == 0, sink, -float("inf"))
        m = sink
        mass = tl.where(split == 0, 2.0**SHIFT, 0.0) + mass
    for masked in tl.static_range(2):
        if masked == 0:
            low, high = begin, tl.minimum(stop, full_count)
        else:
            low, high = tl.maximum(begin, full_count) - full_count, stop - full_count
        acc, m, mass, zeros = _visit(
            acc,
            m,
            mass,
            zeros,
            q,
            q_sum,
            positions,
            valid,
            context,
            low,
            high,
            visits,
            capacity,
            mask,
            width,
            described,
            length,
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
            D,
            DV,
            DP,
            DVP,
            BN,
            PAGE,
            K_CODE,
            V_CODE,
            K_SCALED,
            V_SCALED,
            K_ZERO,
            V_ZERO,
            K_GROUPS,
            V_GROUPS,
            VECTORS,
            CAUSAL,
            RANGES,
            masked == 1,
            SEGMENT,
            SOFTCAP,
            SHIFT,
            OLD,
            STAGES if masked == 0 else 1,
        )

    sink_mass = mass * 0.0
    if SINKS:
        sink_mass = tl.where(split == 0, tl.exp2(sink - m + SHIFT), 0.0)
    acc, lse = finish(
        acc, m, mass, zeros, sink_mass, v_scale, v_zero, DV, DVP, V_SCALED, V_ZERO, V_GROUPS, SHIFT
    )
    channel = tl.arange(0, DVP)
    at = split.to(tl.int64) * part + token.to(tl.int64) * (kv_heads * G) + q_index
    to = out_ptr + at[:, None] * DV + channel[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), valid[:, None] & (channel < DV)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + at, lse, valid)
