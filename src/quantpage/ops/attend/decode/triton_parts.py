"""Strided parts of queries and outputs: words of codes hold channels r, r + parts, r + 2 parts."""

import triton
import triton.language as tl


@triton.jit
def query_part(
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
