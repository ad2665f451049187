"""What the portable attention kernels share: rows of pages, scores, the running softmax, its end.

Codes become float16 exactly; what they are multiplied by enters where it costs least:

    key scale, zero      a token and kv_head: the column of scores; a channel: the query, beforehand
    value scale, zero    a token and kv_head: the probability; a channel: the output, afterwards
    several a row        on the numbers themselves, in float32

K_SCALED, V_SCALED: 0 no scale, 1 one a token, 2 one a channel (static), 3 several a row.
"""

import triton
import triton.language as tl

from quantpage.ops.triton.codes import to_float16
from quantpage.ops.triton.common import A_TOKEN, INT4, LN2, NONE, SEVERAL, STATIC


@triton.jit
def _rows_of(
    codes, scale, zero, code_at, scale_at, shown, D: tl.constexpr, DP: tl.constexpr,
    CODE: tl.constexpr, SCALED: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr,
    MASKED: tl.constexpr, OLD: tl.constexpr,
):  # fmt: skip
    """A tile of numbers [BN, DP], float16 or the cache's own dtype; hidden rows are 0."""
    W: tl.constexpr = DP // 2 if CODE == INT4 else DP
    FULL: tl.constexpr = D // 2 if CODE == INT4 else D
    channel = tl.arange(0, W)
    at = codes + code_at[:, None] + channel[None, :]
    # A nibble of 8 is the number 0.
    other: tl.constexpr = 0x88 if CODE == INT4 else 0
    if MASKED and FULL < W:
        number = tl.load(at, shown[:, None] & (channel < FULL)[None, :], other)
    elif MASKED:
        number = tl.load(at, shown[:, None], other)
    elif FULL < W:
        number = tl.load(at, (channel < FULL)[None, :], other)
    else:
        number = tl.load(at)
    if CODE != NONE:
        number = to_float16(number, CODE, OLD)
    if SCALED == SEVERAL:
        channel = tl.arange(0, DP)
        keep = shown[:, None] & (channel < D)[None, :]
        own = scale_at[:, None] + (channel // (D // GROUPS))[None, :]
        number = number.to(tl.float32) * tl.load(scale + own, keep, 0.0).to(tl.float32)
        if ZERO:
            number += tl.load(zero + own, keep, 0.0).to(tl.float32)
        number = number.to(tl.float16)
    return number


@triton.jit
def _column(plane, at, shown, MASKED: tl.constexpr):
    """One scale or zero a key, float32; 0 for hidden keys."""
    if MASKED:
        return tl.load(plane + at, shown, 0.0).to(tl.float32)
    else:
        return tl.load(plane + at).to(tl.float32)


@triton.jit
def load_queries(
    q_at, keep_rows, k_scale, k_zero, D: tl.constexpr, DP: tl.constexpr, K_SCALED: tl.constexpr,
    K_ZERO: tl.constexpr, K_GROUPS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Queries [BM, DP] as an operand, and what a key's zero is multiplied by, a row.

    q_at: pointers to the rows.
    """
    channel = tl.arange(0, DP)
    inside = channel < D
    q = tl.load(q_at[:, None] + channel[None, :], keep_rows[:, None] & inside[None, :], 0.0)
    # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
    q = tl.where(tl.abs(q.to(tl.float32)) < float("inf"), q, float("nan"))
    q_sum = tl.zeros([q.shape[0]], tl.float32)
    if K_SCALED == STATIC:
        own = channel // (D // K_GROUPS)
        q = q.to(tl.float32)
        if K_ZERO:
            q_sum = tl.sum(q * tl.load(k_zero + own, inside, 0.0).to(tl.float32)[None, :], 1)
        q *= tl.load(k_scale + own, inside, 0.0).to(tl.float32)[None, :]
    q = q.to(OPERAND)
    if K_SCALED == A_TOKEN and K_ZERO:
        q_sum = tl.sum(q.to(tl.float32), 1)
    return q, q_sum


@triton.jit
def scores(
    q, q_sum, codes, k_scale, k_zero, code_at, scale_at, shown, scale, cap, D: tl.constexpr,
    DP: tl.constexpr, K_CODE: tl.constexpr, K_SCALED: tl.constexpr, K_ZERO: tl.constexpr,
    K_GROUPS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, OLD: tl.constexpr,
):  # fmt: skip
    """Scores [BM, BN] and what is left to multiply them by, in the exponent's multiply-add."""
    k = _rows_of(
        codes, k_scale, k_zero, code_at, scale_at, shown, D, DP, K_CODE, K_SCALED, K_ZERO,
        K_GROUPS, MASKED, OLD,
    )  # fmt: skip
    s = tl.dot(q, k.T, input_precision="ieee")
    rest = scale
    if K_SCALED == A_TOKEN:
        s *= (_column(k_scale, scale_at, shown, MASKED) * scale)[None, :]
        if K_ZERO:
            own = _column(k_zero, scale_at, shown, MASKED) * scale
            s += own[None, :] * q_sum[:, None]
        rest = 1.0
    elif K_SCALED == STATIC and K_ZERO:
        s += q_sum[:, None]
    if SOFTCAP:
        s = cap - 2.0 * cap / (1.0 + tl.exp2(s * rest))
        rest = 1.0
    return s, rest


@triton.jit
def accumulate(
    acc, m, mass, zeros, s, rest, codes, v_scale, v_zero, code_at, scale_at, shown, seen,
    DV: tl.constexpr, DVP: tl.constexpr, V_CODE: tl.constexpr, V_SCALED: tl.constexpr,
    V_ZERO: tl.constexpr, V_GROUPS: tl.constexpr, MASKED: tl.constexpr, SHIFT: tl.constexpr,
    OLD: tl.constexpr,
):  # fmt: skip
    """One tile of scores and its values into the running output, maximum, mass and zeros.

    seen: which pairs the mask shows, if MASKED; shown: the keys that some row sees.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * rest)
    shift = m_new - SHIFT
    if MASKED:
        shift = tl.where(m_new == -float("inf"), 0.0, shift)
    p = tl.exp2(s * rest - shift[:, None])
    alpha = tl.exp2(m - SHIFT - shift)
    mass = mass * alpha + tl.sum(p, 1)
    acc *= alpha[:, None]
    v = _rows_of(
        codes, v_scale, v_zero, code_at, scale_at, shown, DV, DVP, V_CODE, V_SCALED, V_ZERO,
        V_GROUPS, MASKED, OLD,
    )  # fmt: skip
    if V_SCALED == A_TOKEN:
        if V_ZERO:
            offset = p * _column(v_zero, scale_at, shown, MASKED)[None, :]
            if MASKED:
                offset = tl.where(seen, offset, 0.0)
            zeros = zeros * alpha + tl.sum(offset, 1)
        p *= _column(v_scale, scale_at, shown, MASKED)[None, :]
        if MASKED:
            p = tl.where(seen, p, 0.0)
    if MASKED and (V_CODE == NONE or V_SCALED == SEVERAL):
        # A value that is not finite reaches the rows that see it, through their own weight of it:
        # in the product it would reach all of them, as 0 times NaN is NaN.
        bad = tl.max((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1) > 0
        v = tl.where(bad[:, None], 0.0, v)
        p = tl.where(seen & bad[None, :], float("nan"), p)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, m_new, mass, zeros


@triton.jit
def finish(
    acc, m, mass, zeros, sink_mass, v_scale, v_zero, DV: tl.constexpr, DVP: tl.constexpr,
    V_SCALED: tl.constexpr, V_ZERO: tl.constexpr, V_GROUPS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Output [BM, DVP] and natural log-sum-exp; sink_mass: what a sink logit is of the mass."""
    total = tl.where(mass == 0.0, 1.0, mass)
    lse = tl.where(mass == 0.0, -float("inf"), (m - SHIFT + tl.log2(total)) * LN2)
    acc = (acc + zeros[:, None]) / total[:, None]
    if V_SCALED == STATIC:
        channel = tl.arange(0, DVP)
        inside = channel < DV
        own = channel // (DV // V_GROUPS)
        acc *= tl.load(v_scale + own, inside, 0.0).to(tl.float32)[None, :]
        if V_ZERO:
            # A sink logit has no value: the zero belongs to what the keys alone weigh.
            weight = tl.where(mass == 0.0, 0.0, 1.0) - sink_mass / total
            acc += weight[:, None] * tl.load(v_zero + own, inside, 0.0).to(tl.float32)[None, :]
    return acc, lse
