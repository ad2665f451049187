"""Strided parts of queries and outputs: words of codes hold channels r, r + parts, r + 2 parts."""

import triton
import triton.language as tl

from quantpage.ops.attend.decode.triton_planes import first_of_pair, part_of_pairs
from quantpage.ops.operand import CODE_KINDS
from quantpage.ops.triton.common import INT3, INT4, NONE
from quantpage.ops.triton.planes import half_range, in_planes


@triton.constexpr_function
def parts_of(code):
    """Codes in what a row is read by: 1 as they come, 4 in a word of bytes, else 8."""
    if code == CODE_KINDS["none"]:
        return 1
    return 8 if code == CODE_KINDS["int4"] or in_planes(code) else 4


@triton.constexpr_function
def width_of(channels, code):
    """Places of a tile as wide as a row: products need an inner and an outer width of 16."""
    return max(16, triton.next_power_of_2(channels // parts_of(code)))


@triton.constexpr_function
def part_channel(part, code, channels):
    """The channel of a part, less that of part 0 in the same place."""
    return part_of_pairs(part, channels) if in_planes(code) else part


@triton.jit
def first_channel(place, D: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr):
    """The channel of part 0 in each place of a tile WIDTH wide."""
    if in_planes(CODE):
        return first_of_pair(place, D, WIDTH, CODE)
    else:
        return place * parts_of(CODE)


@triton.jit
def _query_part(
    q, first, PART: tl.constexpr, q_rows, real, k_scale, k_zero, HEAD_DIM: tl.constexpr,
    CODE: tl.constexpr, STATIC: tl.constexpr, STATIC_ZERO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One strided part of the queries with static scales folded in, its finite sizes, and its terms
    of the row's sums: reduced once, after all parts.
    """
    channel = first + part_channel(PART, CODE, HEAD_DIM)
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
    q, q_rows, real, k_scale, k_zero, first, HEAD_DIM: tl.constexpr, CODE: tl.constexpr,
    PARTS: tl.constexpr, STATIC_SCALES: tl.constexpr, STATIC_ZERO: tl.constexpr,
    SHARED: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """The queries as operands, in the parts that words of K come in, from their channels ``first``
    on; of eight, those that K's code does not have repeat the first.

    With them: the unit that scores are divided by again, which keeps float16 in range; each row's
    sum, for zeros of keys; the bias of scores of codes that come as they are stored.
    """
    q0, peak, q_sum = _query_part(
        q, first, 0, q_rows, real, k_scale, k_zero, HEAD_DIM, CODE, STATIC_SCALES,
        STATIC_ZERO, SHARED,
    )  # fmt: skip
    q1, q2, q3, q4, q5, q6, q7 = q0, q0, q0, q0, q0, q0, q0
    if PARTS > 1:
        q1, peak1, sum1 = _query_part(
            q, first, 1, q_rows, real, k_scale, k_zero, HEAD_DIM, CODE, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q2, peak2, sum2 = _query_part(
            q, first, 2, q_rows, real, k_scale, k_zero, HEAD_DIM, CODE, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q3, peak3, sum3 = _query_part(
            q, first, 3, q_rows, real, k_scale, k_zero, HEAD_DIM, CODE, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        peak = tl.maximum(tl.maximum(peak, peak1), tl.maximum(peak2, peak3))
        q_sum += sum1 + sum2 + sum3
    if PARTS > 4:
        q4, peak4, sum4 = _query_part(
            q, first, 4, q_rows, real, k_scale, k_zero, HEAD_DIM, CODE, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q5, peak5, sum5 = _query_part(
            q, first, 5, q_rows, real, k_scale, k_zero, HEAD_DIM, CODE, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q6, peak6, sum6 = _query_part(
            q, first, 6, q_rows, real, k_scale, k_zero, HEAD_DIM, CODE, STATIC_SCALES,
            STATIC_ZERO, SHARED,
        )  # fmt: skip
        q7, peak7, sum7 = _query_part(
            q, first, 7, q_rows, real, k_scale, k_zero, HEAD_DIM, CODE, STATIC_SCALES,
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
    # Constants of the compiler.
    odd: tl.constexpr = 0.0625 if CODE == INT4 or CODE == INT3 else 1.0  # noqa: SIM109
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
    if CODE == INT4 or in_planes(CODE):
        even_sum = q0.to(tl.float32) + q2.to(tl.float32) + q4.to(tl.float32) + q6.to(tl.float32)
        odd_sum = q1.to(tl.float32) + q3.to(tl.float32) + q5.to(tl.float32) + q7.to(tl.float32)
        # Codes come as 1024 + half + code; odd ones of 4 and 3 bits as 16 (64 + half + code), for a
        # sixteenth of q.
        half: tl.constexpr = half_range(CODE) if in_planes(CODE) else 8
        odd_bias: tl.constexpr = 1024.0 + half * (16.0 if odd < 1.0 else 1.0)
        bias = tl.sum(even_sum * (1024.0 + half) + odd_sum * odd_bias, 0)
    return q0, q1, q2, q3, q4, q5, q6, q7, unit, q_sum, bias


@triton.jit
def _store_part(
    at, acc, first, PART: tl.constexpr, real, ratio, mass, extra, v_scale, v_zero,
    VALUE_DIM: tl.constexpr, CODE: tl.constexpr, STATIC: tl.constexpr,
    STATIC_ZERO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One strided part of the output, finished and stored."""
    channel = first + part_channel(PART, CODE, VALUE_DIM)
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
    first, first4, first8, VALUE_DIM: tl.constexpr, CODE: tl.constexpr, STATIC: tl.constexpr,
    STATIC_ZERO: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The output's strided parts, finished and stored; accumulators past those of V's code are
    unused.
    """
    PARTS: tl.constexpr = parts_of(CODE)
    _store_part(to, acc0, first, 0, real, ratio, mass, extra, v_scale, v_zero,
                VALUE_DIM, CODE, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
    if PARTS > 1:
        _store_part(to, acc1, first4, 1, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, CODE, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc2, first4, 2, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, CODE, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc3, first4, 3, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, CODE, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
    if PARTS > 4:
        _store_part(to, acc4, first8, 4, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, CODE, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc5, first8, 5, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, CODE, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc6, first8, 6, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, CODE, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
        _store_part(to, acc7, first8, 7, real, ratio, mass, extra, v_scale, v_zero,
                    VALUE_DIM, CODE, STATIC, STATIC_ZERO, SHARED)  # fmt: skip
