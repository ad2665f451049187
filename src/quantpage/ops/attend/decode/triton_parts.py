"""Strided parts of queries and outputs: words of codes hold channels r, r + parts, r + 2 parts."""

import triton
import triton.language as tl

from quantpage.ops.triton.common import INT4, NONE
from quantpage.ops.triton.planes import half_range, in_planes


@triton.jit
def _query_part(
    q, channel, q_rows, real, k_scale, k_zero, HEAD_DIM: tl.constexpr,
    STATIC: tl.constexpr, STATIC_ZERO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One strided part of the queries with static scales folded in, its finite sizes, and its terms
    of the row's sums: reduced once, after all parts.
    """
    mask = real[None, :] & (channel < HEAD_DIM)[:, None]
    part = tl.load(q + q_rows[None, :] + channel[:, None], mask, 0.0).to(tl.float32)
    if STATIC_ZERO:
        zero = tl.load(k_zero + channel // SHARED, channel < HEAD_DIM, 0.0).to(tl.float32)
        terms = part * zero[:, None]
    else:
        terms = part
    if STATIC:
        scale = tl.load(k_scale + channel // SHARED, channel < HEAD_DIM, 0.0).to(tl.float32)
        part = part * scale[:, None]
    size = tl.abs(part)
    finite = size < float("inf")
    # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
    return tl.where(finite, part, float("nan")), tl.where(finite, size, 0.0), terms


@triton.jit
def load_queries(
    q, q_rows, real, k_scale, k_zero, word, HEAD_DIM: tl.constexpr, CODE: tl.constexpr,
    PARTS: tl.constexpr, STATIC_SCALES: tl.constexpr, STATIC_ZERO: tl.constexpr,
    SHARED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """The queries as operands, in the parts that words of K come in; of eight, those that K's code
    does not have repeat the first.

    With them: the unit that scores are divided by again, which keeps float16 in range; each row's
    sum, for zeros of keys; the bias of scores of codes that come as they are stored.
    """
    q0, peak, q_sum = _query_part(
        q, word * PARTS, q_rows, real, k_scale, k_zero, HEAD_DIM, STATIC_SCALES,
        STATIC_ZERO, SHARED,
    )  # fmt: skip
    q1, q2, q3, q4, q5, q6, q7 = q0, q0, q0, q0, q0, q0, q0
    if PARTS > 1:
        q1, peak1, sum1 = _query_part(
            q, word * PARTS + 1, q_rows, real, k_scale, k_zero, HEAD_DIM, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q2, peak2, sum2 = _query_part(
            q, word * PARTS + 2, q_rows, real, k_scale, k_zero, HEAD_DIM, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q3, peak3, sum3 = _query_part(
            q, word * PARTS + 3, q_rows, real, k_scale, k_zero, HEAD_DIM, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        peak = tl.maximum(tl.maximum(peak, peak1), tl.maximum(peak2, peak3))
        q_sum += sum1 + sum2 + sum3
    if PARTS > 4:
        q4, peak4, sum4 = _query_part(
            q, word * PARTS + 4, q_rows, real, k_scale, k_zero, HEAD_DIM, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q5, peak5, sum5 = _query_part(
            q, word * PARTS + 5, q_rows, real, k_scale, k_zero, HEAD_DIM, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q6, peak6, sum6 = _query_part(
            q, word * PARTS + 6, q_rows, real, k_scale, k_zero, HEAD_DIM, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q7, peak7, sum7 = _query_part(
            q, word * PARTS + 7, q_rows, real, k_scale, k_zero, HEAD_DIM, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        peak = tl.maximum(peak, tl.maximum(tl.maximum(peak4, peak5), tl.maximum(peak6, peak7)))
        q_sum += sum4 + sum5 + sum6 + sum7
    unit = 1.0
    bias = 0.0
    q_sum = tl.sum(q_sum, 0)
    if CODE != NONE:
        peak = tl.max(peak)
        unit = tl.where(peak > 1e-30, 16384.0 / tl.maximum(peak, 1e-30), 1.0)
    odd: tl.constexpr = 0.0625 if CODE == INT4 else 1.0
    q0 = (q0 * unit).to(NUMBER)
    if PARTS > 1:
        q1 = (q1 * (unit * odd)).to(NUMBER)
        q2 = (q2 * unit).to(NUMBER)
        q3 = (q3 * (unit * odd)).to(NUMBER)
    if PARTS > 4:
        q4 = (q4 * unit).to(NUMBER)
        q5 = (q5 * (unit * odd)).to(NUMBER)
        q6 = (q6 * unit).to(NUMBER)
        q7 = (q7 * (unit * odd)).to(NUMBER)
    if CODE == INT4:
        # Even codes come as 1032 + code, odd ones as 16 (72 + code), for a sixteenth of q.
        even_sum = q0.to(tl.float32) + q2.to(tl.float32) + q4.to(tl.float32) + q6.to(tl.float32)
        odd_sum = q1.to(tl.float32) + q3.to(tl.float32) + q5.to(tl.float32) + q7.to(tl.float32)
        bias = tl.sum(even_sum * 1032.0 + odd_sum * 1152.0, 0)
    elif in_planes(CODE):
        whole = q0.to(tl.float32) + q1.to(tl.float32) + q2.to(tl.float32) + q3.to(tl.float32)
        bias = tl.sum(whole * (1024.0 + half_range(CODE)), 0)
    return q0, q1, q2, q3, q4, q5, q6, q7, unit, q_sum, bias


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
def store_parts(
    to, acc0, acc1, acc2, acc3, acc4, acc5, acc6, acc7, real, ratio, mass, extra, v_scale, v_zero,
    v_word, v_word4, v_word8, VALUE_DIM: tl.constexpr, PARTS: tl.constexpr, STATIC: tl.constexpr,
    STATIC_ZERO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The output's strided parts, finished and stored; accumulators past ``PARTS`` are unused."""
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
