"""What the write kernel does to a tile of rows: finite, quantize, scatter.

Rows come cut into pieces: a tuple of [ROWS, PIECE] tensors. The arithmetic is that of
formats/quantize in float32, operation by operation, so that codes are equal: division to the last
bit, rounding half to even (adding 1.5 * 2^23 leaves no fraction bits), e4m3 by the device where it
has the instruction (sm_89 on) and else by its own rounding of the float32 bits.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

_ROUND: tl.constexpr = tl.constexpr(12582912.0)
_FLOAT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _finite(x):
    x = tl.where(x == x, x, 0.0)
    return tl.where(x > _FLOAT_MAX, _FLOAT_MAX, tl.where(x < -_FLOAT_MAX, -_FLOAT_MAX, x))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _within(parts, CHANNELS: tl.constexpr, PIECE: tl.constexpr, fill):
    """The pieces with ``fill`` in place of channels that a row does not have."""
    if len(parts) * PIECE > CHANNELS:
        inside = (len(parts) - 1) * PIECE + tl.arange(0, PIECE) < CHANNELS
        kept = ()
        for i in tl.static_range(len(parts) - 1):
            kept = kept + (parts[i],)
        return kept + (tl.where(inside[None, :], parts[len(parts) - 1], fill),)
    else:
        return parts


@triton.jit
def _extremes(
    parts, ZERO: tl.constexpr, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Largest and smallest number of each group, [ROWS, GROUPS]; without ZERO the largest size.

    NaN where the group has one. Pieces are folded first, so that threads exchange numbers once.
    """
    if ZERO:
        above = _within(parts, HEAD_DIM, PIECE, float("-inf"))
        below = _within(parts, HEAD_DIM, PIECE, float("inf"))
        high = above[0]
        low = below[0]
        for i in tl.static_range(1, len(parts)):
            high = _larger(high, above[i])
            low = _smaller(low, below[i])
        low = tl.reduce(tl.reshape(low, [ROWS, GROUPS, PIECE // GROUPS]), 2, _smaller)
        return tl.reduce(tl.reshape(high, [ROWS, GROUPS, PIECE // GROUPS]), 2, _larger), low
    else:
        high = tl.abs(parts[0])
        for i in tl.static_range(1, len(parts)):
            high = _larger(high, tl.abs(parts[i]))
        high = tl.reduce(tl.reshape(high, [ROWS, GROUPS, PIECE // GROUPS]), 2, _larger)
        return high, -high


@triton.jit
def _finite_extremes(
    parts, ZERO: tl.constexpr, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """The pieces with NaN as 0 and infinities as the largest number, and their extremes.

    Hardly any tile needs the change: the extremes, needed anyway, decide for all of it.
    """
    high, low = _extremes(parts, ZERO, HEAD_DIM, PIECE, ROWS, GROUPS)
    # Groups of padding are (-inf, inf).
    fine = (high <= _FLOAT_MAX) & (low >= -_FLOAT_MAX)
    if tl.max(tl.max(tl.where(fine, 0, 1), 1), 0) != 0:
        fixed = ()
        for i in tl.static_range(len(parts)):
            fixed = fixed + (_finite(parts[i]),)
        parts = fixed
        high, low = _extremes(parts, ZERO, HEAD_DIM, PIECE, ROWS, GROUPS)
    return parts, high, low


@triton.jit
def _rounded(x, LIMIT: tl.constexpr, plane):
    """Rounded to the planes' dtype, as float32."""
    held = tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))
    return held.to(plane.dtype.element_ty).to(tl.float32)


@triton.jit
def _e4m3(x):
    """Nearest e4m3 code of |x| <= 448, half to even, as a byte, and the number it stands for."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    # Three mantissa bits stay; the exponent's bias goes from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9.
    small = ((size * 512.0 + _ROUND) - _ROUND).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    half = (code << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(x < 0, code | 128, code), tl.where(x < 0, -half, half)


@triton.jit
def _scales(
    high, low, scale, zero, ZERO: tl.constexpr, QMAX: tl.constexpr, QMIN: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Scale and zero of groups, rounded to the planes' dtype, as float32."""
    if ZERO:
        # Groups of padding hold nothing.
        high = tl.where(high == float("-inf"), 0.0, high)
        low = tl.where(low == float("inf"), 0.0, low)
        span = tl.math.div_rn(high * 0.5 - low * 0.5, QMAX - QMIN) * 2.0
        step = _rounded(span, LIMIT, scale)
        step = tl.where(step == 0.0, 1.0, step)
        flat = high == low
        base = _rounded(tl.where(flat, low, low - QMIN * step), LIMIT, zero)
        step = tl.where(flat, 1.0, step)
    else:
        step = _rounded(tl.math.div_rn(high, high * 0.0 + QMAX), LIMIT, scale)
        step = tl.where(step == 0.0, 1.0, step)
        base = step * 0.0
    return step, base


@triton.jit
def _spread(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, PIECE: tl.constexpr):
    """[ROWS, GROUPS] -> [ROWS, PIECE]."""
    x = tl.broadcast_to(x[:, :, None], [ROWS, GROUPS, PIECE // GROUPS])
    return tl.reshape(x, [ROWS, PIECE])


@triton.jit
def _code_of(
    x, step, inverse, base, CODE: tl.constexpr, ZERO: tl.constexpr, QMAX: tl.constexpr,
    LOW: tl.constexpr, TAME: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Codes in the low byte of integers, and the numbers they stand for; HARDWARE: not those.

    TAME: the scale was computed from these rows and is of 16 bits, so that x / step is finite.
    """
    if ZERO:
        x = x - base
    # x / step, correctly rounded as by a division, from one division a group; a number that is
    # clipped anyway needs no correction, and might not be finite in it.
    quotient = x * inverse
    scaled = tl.math.fma(tl.math.fma(-quotient, step, x), inverse, quotient)
    if not TAME:
        scaled = tl.where(tl.abs(quotient) < 1024.0, scaled, quotient)
    # Clipping to whole numbers first changes no code, and keeps the rounding in its range.
    scaled = tl.minimum(tl.maximum(scaled, LOW), QMAX)
    if CODE == 2:
        if HARDWARE:
            # Reading the converted pair back is miscompiled by ptxas 12.8: within a loop it gives
            # the pair of the iteration before. So whoever wants numbers rounds by hand.
            return scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True), scaled
        else:
            return _e4m3(scaled)
    else:
        shifted = scaled + _ROUND
        # The integer stands in the low mantissa bits.
        return shifted.to(tl.int32, bitcast=True) - 0x4B400000, shifted - _ROUND


@triton.jit
def store_parts(to, parts, keep, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr):
    """Pieces of rows that begin at ``to`` [ROWS], where ``keep``."""
    for i in tl.static_range(len(parts)):
        channel = i * PIECE + tl.arange(0, PIECE)
        mask = keep[:, None]
        if (i + 1) * PIECE > HEAD_DIM:
            mask = mask & (channel < HEAD_DIM)[None, :]
        tl.store(to[:, None] + channel[None, :], parts[i].to(to.dtype.element_ty), mask)


@triton.jit
def write_exact(
    parts, slots, head, pages, page_stride, head_stride, HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Scatter rows as they are; negative slots are left out."""
    slot = tl.maximum(slots, 0)
    at = slot // PAGE * page_stride + head * head_stride + slot % PAGE * HEAD_DIM
    store_parts(pages + at, parts, slots >= 0, HEAD_DIM, PIECE)


@triton.jit
def write_rows(
    parts, real, slots, head, codes, scale, zero, page_stride, head_stride, scale_page,
    scale_head, seen,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr, HARDWARE: tl.constexpr, RETURN: tl.constexpr,
):  # fmt: skip
    """Quantize rows and scatter them; the round-tripped rows go to ``seen``.

    SCALES: 0 none, 1 dynamic, 2 static. SHARED: channels that share a scale (dynamic: at least
    HEAD_DIM for all of them, else a power of two, and rows are one piece). HARDWARE: the device
    converts to e4m3.
    """
    if CODE == 0:
        write_exact(parts, slots, head, codes, page_stride, head_stride, HEAD_DIM, PIECE, PAGE)
        numbers = parts
    else:
        numbers = _write_codes(
            parts, slots, head, codes, scale, zero, page_stride, head_stride, scale_page,
            scale_head, CODE, SCALES, ZERO, SHARED, HEAD_DIM, PIECE, PAGE, ROWS, LIMIT,
            HARDWARE and not RETURN,
        )  # fmt: skip
    if RETURN:
        store_parts(seen, numbers, real, HEAD_DIM, PIECE)


@triton.jit
def _write_codes(
    parts, slots, head, codes, scale, zero, page_stride, head_stride, scale_page, scale_head,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Codes and dynamic scales of rows; the pieces as they read back."""
    keep = slots >= 0
    page = tl.maximum(slots, 0) // PAGE
    slot = tl.maximum(slots, 0) % PAGE
    at = page * page_stride + head * head_stride
    QMAX: tl.constexpr = 448.0 if CODE == 2 else (127.0 if CODE == 1 else 7.0)
    QMIN: tl.constexpr = -128.0 if CODE == 1 else -8.0
    LOW: tl.constexpr = QMIN if ZERO else -QMAX
    GROUPS: tl.constexpr = PIECE // SHARED if SCALES == 1 and SHARED < HEAD_DIM else 1
    parts, high, low = _finite_extremes(parts, ZERO and SCALES == 1, HEAD_DIM, PIECE, ROWS, GROUPS)
    if SCALES == 1:
        step, base = _scales(high, low, scale, zero, ZERO, QMAX, QMIN, LIMIT)
        group = tl.arange(0, GROUPS)
        HELD: tl.constexpr = HEAD_DIM // SHARED if SHARED < HEAD_DIM else 1
        plane = page * scale_page + head * scale_head + slot * HELD
        plane = plane[:, None] + group[None, :]
        mask = keep[:, None] & (group < HELD)[None, :]
        tl.store(scale + plane, step.to(scale.dtype.element_ty), mask)
        if ZERO:
            tl.store(zero + plane, base.to(zero.dtype.element_ty), mask)
        inverse = _spread(tl.math.div_rn(step * 0.0 + 1.0, step), ROWS, GROUPS, PIECE)
        step = _spread(step, ROWS, GROUPS, PIECE)
        base = _spread(base, ROWS, GROUPS, PIECE)
    PER: tl.constexpr = 2 if CODE == 3 else 1
    numbers = ()
    for i in tl.static_range(len(parts)):
        if SCALES == 2:
            channel = i * PIECE + tl.arange(0, PIECE)
            plane = head * scale_head + channel // SHARED
            step = tl.load(scale + plane, channel < HEAD_DIM, 1.0).to(tl.float32)[None, :]
            inverse = tl.broadcast_to(tl.math.div_rn(step * 0.0 + 1.0, step), [ROWS, PIECE])
            step = tl.broadcast_to(step, [ROWS, PIECE])
            base = step * 0.0
            if ZERO:
                base = tl.load(zero + plane, channel < HEAD_DIM, 0.0).to(tl.float32)[None, :]
                base = tl.broadcast_to(base, [ROWS, PIECE])
        byte, number = _code_of(
            parts[i], step, inverse, base, CODE, ZERO, QMAX, LOW, SCALES == 1 and LIMIT < 65536.0,
            HARDWARE,
        )  # fmt: skip
        numbers = numbers + (number * step + base,)
        if CODE == 3:
            first, second = tl.split(tl.reshape(byte + 8, [ROWS, PIECE // 2, 2]))
            byte = first | (second << 4)
        channel = i * (PIECE // PER) + tl.arange(0, PIECE // PER)
        mask = keep[:, None]
        if (i + 1) * PIECE > HEAD_DIM:
            mask = mask & (channel < HEAD_DIM // PER)[None, :]
        to = codes + (at + slot * (HEAD_DIM // PER))[:, None] + channel[None, :]
        tl.store(to, byte.to(codes.dtype.element_ty), mask)
    return numbers
