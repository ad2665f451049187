"""What the portable attention kernels share: a tile of keys from pages to the running softmax.

Codes become float16 exactly; what they are multiplied by enters where it costs least:

    key scale, zero      a token and kv_head: the column of scores; a channel: the query, beforehand
    value scale, zero    a token and kv_head: the probability; a channel: the output, afterwards
    several a row        on the numbers themselves, in float32

Records hold what goes together through the functions. Triton takes a record that was given a name
for numbers of the device throughout, so that constants stay constants only in one that is handed
on where it is made: kernels call a function with their halves for all that follows.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantpage.ops.triton.codes import row_of, to_float16
from quantpage.ops.triton.common import A_TOKEN, INT4, LN2, NONE, SEVERAL, STATIC
from quantpage.ops.triton.planes import in_planes, plane_numbers


class Half(NamedTuple):
    """K or V of one kv_head."""

    codes: Any
    scale: Any
    zero: Any
    page: Any
    """From page to page, in elements of codes."""
    scale_page: Any
    """The same of scales and zeros."""
    D: tl.constexpr
    """Channels."""
    DP: tl.constexpr
    """Channels of a tile, a power of two."""
    CODE: tl.constexpr
    SCALED: tl.constexpr
    """Owner of scales: NO_SCALES, A_TOKEN, STATIC or SEVERAL (ops/operand)."""
    ZERO: tl.constexpr
    GROUPS: tl.constexpr
    """Scales a row."""


class Rows(NamedTuple):
    """The running softmax of a tile's query rows."""

    acc: Any
    """Output so far, [rows, channels]."""
    top: Any
    """Largest score, per log2."""
    mass: Any
    """Sum of probabilities, 2**SHIFT at the largest score."""
    zeros: Any
    """Sum of probabilities times the values' zeros."""


class Scoring(NamedTuple):
    """How scores become probabilities."""

    scale: Any
    """Of scores, for exp2; under a cap what tanh is made of (params.exponent_scale)."""
    cap: Any
    SOFTCAP: tl.constexpr
    SHIFT: tl.constexpr
    """log2 of the largest probability: keeps small ones out of float16's subnormals."""
    OLD: tl.constexpr
    """No e4m3 conversion instruction (before sm_89)."""


@triton.jit
def _numbers(half, code_at, scale_at, shown, MASKED: tl.constexpr, OLD: tl.constexpr):
    """A tile of numbers [BN, DP], float16 or the cache's own dtype; hidden rows are 0."""
    if in_planes(half.CODE):
        rows = half.codes + code_at[:, None]
        number = plane_numbers(rows, shown[:, None], half.D, half.DP, half.CODE, MASKED)
    else:
        W: tl.constexpr = half.DP // 2 if half.CODE == INT4 else half.DP
        FULL: tl.constexpr = half.D // 2 if half.CODE == INT4 else half.D
        channel = tl.arange(0, W)
        at = half.codes + code_at[:, None] + channel[None, :]
        # A nibble of 8 is the number 0.
        other: tl.constexpr = 0x88 if half.CODE == INT4 else 0
        if MASKED and FULL < W:
            number = tl.load(at, shown[:, None] & (channel < FULL)[None, :], other)
        elif MASKED:
            number = tl.load(at, shown[:, None], other)
        elif FULL < W:
            number = tl.load(at, (channel < FULL)[None, :], other)
        else:
            number = tl.load(at)
        if half.CODE != NONE:
            number = to_float16(number, half.CODE, OLD)
    if half.SCALED == SEVERAL:
        channel = tl.arange(0, half.DP)
        keep = shown[:, None] & (channel < half.D)[None, :]
        own = scale_at[:, None] + (channel // (half.D // half.GROUPS))[None, :]
        number = number.to(tl.float32) * tl.load(half.scale + own, keep, 0.0).to(tl.float32)
        if half.ZERO:
            number += tl.load(half.zero + own, keep, 0.0).to(tl.float32)
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
def load_queries(q_at, keep_rows, k, OPERAND: tl.constexpr):
    """Queries [BM, DP] as an operand, and what a key's zero is multiplied by, a row.

    q_at: pointers to the rows. k: the keys' half.
    """
    channel = tl.arange(0, k.DP)
    inside = channel < k.D
    q = tl.load(q_at[:, None] + channel[None, :], keep_rows[:, None] & inside[None, :], 0.0)
    # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
    q = tl.where(tl.abs(q.to(tl.float32)) < float("inf"), q, float("nan"))
    q_sum = tl.zeros([q.shape[0]], tl.float32)
    if k.SCALED == STATIC:
        own = channel // (k.D // k.GROUPS)
        q = q.to(tl.float32)
        if k.ZERO:
            q_sum = tl.sum(q * tl.load(k.zero + own, inside, 0.0).to(tl.float32)[None, :], 1)
        q *= tl.load(k.scale + own, inside, 0.0).to(tl.float32)[None, :]
    q = q.to(OPERAND)
    if k.SCALED == A_TOKEN and k.ZERO:
        q_sum = tl.sum(q.to(tl.float32), 1)
    return q, q_sum


@triton.jit
def begin_rows(sink, mass, BM: tl.constexpr, DP: tl.constexpr):
    """Rows that have seen no key, but a logit of ``sink`` per log2 that weighs ``mass``."""
    zeros = tl.zeros([BM], tl.float32)
    return Rows(tl.zeros([BM, DP], tl.float32), sink, zeros + mass, zeros)


@triton.jit
def find_rows(
    table, key0, keys, shown, SLOTS: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr
):
    """Page and slot of each of a tile's keys, and which of ``shown`` have a page.

    SLOTS: keys a page. A tile inside one page looks it up once.
    """
    if SLOTS % BN == 0:
        page = tl.load(table + key0 // SLOTS).to(tl.int64)
        slot = key0 % SLOTS + tl.arange(0, BN)
    elif MASKED:
        page = tl.load(table + keys // SLOTS, shown, -1).to(tl.int64)
        slot = keys % SLOTS
    else:
        page = tl.load(table + keys // SLOTS).to(tl.int64)
        slot = keys % SLOTS
    if MASKED:
        # -1: an exact page that is not kept.
        shown = shown & (page >= 0)
        page = tl.maximum(page, 0)
    return page, slot, shown


@triton.jit
def attend_tile(
    rows, q, q_sum, k, v, page, slot, shown, seen, scoring, MASKED: tl.constexpr,
    CAREFUL: tl.constexpr, SEEN_BY_SOME: tl.constexpr = False,
):  # fmt: skip
    """One tile of keys and values into the running softmax.

    shown: keys that exist. seen: which pairs the mask shows, if MASKED. CAREFUL: values that are
    not finite are kept from rows that do not see them (``spoiled``). SEEN_BY_SOME: each shown key
    is seen by some row.
    """
    K_ROW: tl.constexpr = row_of(k.D, k.CODE, k.codes.dtype.element_ty.primitive_bitwidth // 8)
    V_ROW: tl.constexpr = row_of(v.D, v.CODE, v.codes.dtype.element_ty.primitive_bitwidth // 8)
    if MASKED and not SEEN_BY_SOME:
        # A slot that no row sees may hold NaN: it is not loaded.
        shown = tl.max(seen.to(tl.int32), 0) > 0
    s, rest = _scores(
        q, q_sum, k, page * k.page + slot * K_ROW, page * k.scale_page + slot * k.GROUPS, shown,
        scoring, MASKED,
    )  # fmt: skip
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
    return _accumulate(
        rows, s, rest, v, page * v.page + slot * V_ROW, page * v.scale_page + slot * v.GROUPS,
        shown, seen, scoring, MASKED, CAREFUL,
    )  # fmt: skip


@triton.jit
def _scores(q, q_sum, k, code_at, scale_at, shown, scoring, MASKED: tl.constexpr):
    """Scores [BM, BN] and what is left to multiply them by, in the exponent's multiply-add."""
    numbers = _numbers(k, code_at, scale_at, shown, MASKED, scoring.OLD)
    s = tl.dot(q, numbers.T, input_precision="ieee")
    rest = scoring.scale
    if k.SCALED == A_TOKEN:
        s *= (_column(k.scale, scale_at, shown, MASKED) * scoring.scale)[None, :]
        if k.ZERO:
            own = _column(k.zero, scale_at, shown, MASKED) * scoring.scale
            s += own[None, :] * q_sum[:, None]
        rest = 1.0
    elif k.SCALED == STATIC and k.ZERO:
        s += q_sum[:, None]
    if scoring.SOFTCAP:
        s = scoring.cap - 2.0 * scoring.cap / (1.0 + tl.exp2(s * rest))
        rest = 1.0
    return s, rest


@triton.jit
def _accumulate(
    rows, s, rest, v, code_at, scale_at, shown, seen, scoring, MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
):  # fmt: skip
    """Scores and their values into the running softmax."""
    acc, top, mass, zeros = rows
    new_top = tl.maximum(top, tl.max(s, 1) * rest)
    shift = new_top - scoring.SHIFT
    if MASKED:
        # Of a row that has seen no key yet: -inf less -inf is no number.
        shift = tl.where(new_top == -float("inf"), 0.0, shift)
    p = tl.exp2(s * rest - shift[:, None])
    alpha = tl.exp2(top - scoring.SHIFT - shift)
    mass = mass * alpha + tl.sum(p, 1)
    acc *= alpha[:, None]
    # Loaded only now: before, registers hold the scores.
    numbers = _numbers(v, code_at, scale_at, shown, MASKED, scoring.OLD)
    if v.SCALED == A_TOKEN:
        if v.ZERO:
            offset = p * _column(v.zero, scale_at, shown, MASKED)[None, :]
            if MASKED:
                offset = tl.where(seen, offset, 0.0)
            zeros = zeros * alpha + tl.sum(offset, 1)
        p *= _column(v.scale, scale_at, shown, MASKED)[None, :]
        if MASKED:
            p = tl.where(seen, p, 0.0)
    if MASKED and CAREFUL:
        # A value that is not finite reaches the rows that see it, through their own weight of it:
        # in the product it would reach all of them, as 0 times NaN is NaN.
        bad = tl.max((tl.abs(numbers.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1) > 0
        numbers = tl.where(bad[:, None], 0.0, numbers)
        p = tl.where(seen & bad[None, :], float("nan"), p)
    acc = tl.dot(p.to(numbers.dtype), numbers, acc, input_precision="ieee")
    return Rows(acc, new_top, mass, zeros)


@triton.jit
def spoiled(rows):
    """Whether something that is not finite came into some row's output, maybe one that it is hidden
    from: 0 times NaN is NaN.

    Then the keys are walked once more, carefully: to look at each value of each tile, in case, is
    more than half of a tile's instructions. Values of codes with one scale a row need none of it:
    codes are finite, and scales enter probabilities, which are selected.
    """
    fine = tl.abs(rows.acc) < float("inf")
    return tl.max(tl.max(fine.to(tl.int32) ^ 1, 1), 0) > 0


@triton.jit
def finish(rows, sink_mass, v, SHIFT: tl.constexpr):
    """Output [BM, DVP] and natural log-sum-exp; sink_mass: what a sink logit is of the mass."""
    acc, top, mass, zeros = rows
    total = tl.where(mass == 0.0, 1.0, mass)
    lse = tl.where(mass == 0.0, -float("inf"), (top - SHIFT + tl.log2(total)) * LN2)
    acc = (acc + zeros[:, None]) / total[:, None]
    if v.SCALED == STATIC:
        channel = tl.arange(0, v.DP)
        inside = channel < v.D
        own = channel // (v.D // v.GROUPS)
        acc *= tl.load(v.scale + own, inside, 0.0).to(tl.float32)[None, :]
        if v.ZERO:
            # A sink logit has no value: the zero belongs to what the keys alone weigh.
            weight = tl.where(mass == 0.0, 0.0, 1.0) - sink_mass / total
            acc += weight[:, None] * tl.load(v.zero + own, inside, 0.0).to(tl.float32)[None, :]
    return acc, lse


@triton.jit
def store_rows(out, lse_to, at, keep, acc, lse, v):
    """at: the rows' places among [tokens, q_heads]. lse_to: None where nobody reads it."""
    channel = tl.arange(0, v.DP)
    to = out + at[:, None] * v.D + channel[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), keep[:, None] & (channel < v.D)[None, :])
    if lse_to is not None:
        tl.store(lse_to + at, lse, keep)
