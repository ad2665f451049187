"""What the write kernel does to a tile of rows: finite, Hadamard, quantize, scatter.

The arithmetic is that of formats/quantize in float32, operation by operation, so that codes are
equal: division to the last bit, rounding half to even (adding 1.5 * 2^23 leaves no fraction bits),
e4m3 by its own rounding of the float32 bits (no device before sm_89 converts it).
"""

import triton
import triton.language as tl

_ROUND: tl.constexpr = tl.constexpr(12582912.0)
_FLOAT_MAX: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _finite(x):
    x = tl.where(x == x, x, 0.0)
    return tl.where(x > _FLOAT_MAX, _FLOAT_MAX, tl.where(x < -_FLOAT_MAX, -_FLOAT_MAX, x))


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
def write_rows(
    x,
    real,
    slots,
    head,
    channel,
    codes,
    scale,
    zero,
    page_stride,
    head_stride,
    scale_page,
    scale_head,
    seen,
    CODE: tl.constexpr,
    SCALES: tl.constexpr,
    ZERO: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    LIMIT: tl.constexpr,
    RETURN: tl.constexpr,
):
    """Quantize x [ROWS, WIDTH] and scatter it; the round-tripped rows go to ``seen``.

    SCALES: 0 none, 1 dynamic, 2 static. SHARED: channels that share a scale (dynamic: WIDTH for
    all of them, else a power of two).
    """
    inside = (channel < HEAD_DIM)[None, :]
    keep = real & (slots >= 0)
    page = tl.maximum(slots, 0) // PAGE
    slot = tl.maximum(slots, 0) % PAGE
    at = page * page_stride + head * head_stride
    if CODE == 0:
        to = codes + (at + slot * HEAD_DIM)[:, None] + channel[None, :]
        tl.store(to, x.to(codes.dtype.element_ty), keep[:, None] & inside)
        number = x
    else:
        QMAX: tl.constexpr = 448.0 if CODE == 2 else (127.0 if CODE == 1 else 7.0)
        QMIN: tl.constexpr = -128.0 if CODE == 1 else -8.0
        LOW: tl.constexpr = QMIN if ZERO else -QMAX
        x = _finite(x)
        if SCALES == 1:
            GROUPS: tl.constexpr = WIDTH // SHARED
            grouped = tl.reshape(x, [ROWS, GROUPS, SHARED])
            if ZERO:
                there = tl.reshape(tl.broadcast_to(inside, [ROWS, WIDTH]), [ROWS, GROUPS, SHARED])
                high = tl.max(tl.where(there, grouped, float("-inf")), 2)
                low = tl.min(tl.where(there, grouped, float("inf")), 2)
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
                high = tl.max(tl.abs(grouped), 2)
                step = _rounded(tl.math.div_rn(high, high * 0.0 + QMAX), LIMIT, scale)
                step = tl.where(step == 0.0, 1.0, step)
                base = step * 0.0
            group = tl.arange(0, GROUPS)
            HELD: tl.constexpr = 1 if SHARED >= HEAD_DIM else HEAD_DIM // SHARED
            plane = page * scale_page + head * scale_head + slot * HELD
            mask = keep[:, None] & (group < HELD)[None, :]
            plane = plane[:, None] + group[None, :]
            tl.store(scale + plane, step.to(scale.dtype.element_ty), mask)
            if ZERO:
                tl.store(zero + plane, base.to(zero.dtype.element_ty), mask)
            inverse = tl.math.div_rn(step * 0.0 + 1.0, step)
            inverse = tl.broadcast_to(inverse[:, :, None], [ROWS, GROUPS, SHARED])
            inverse = tl.reshape(inverse, [ROWS, WIDTH])
            step = tl.broadcast_to(step[:, :, None], [ROWS, GROUPS, SHARED])
            step = tl.reshape(step, [ROWS, WIDTH])
            base = tl.broadcast_to(base[:, :, None], [ROWS, GROUPS, SHARED])
            base = tl.reshape(base, [ROWS, WIDTH])
        else:
            plane = head * scale_head + channel // SHARED
            step = tl.load(scale + plane, channel < HEAD_DIM, 1.0).to(tl.float32)[None, :]
            inverse = tl.broadcast_to(tl.math.div_rn(step * 0.0 + 1.0, step), [ROWS, WIDTH])
            step = tl.broadcast_to(step, [ROWS, WIDTH])
            base = step * 0.0
            if ZERO:
                base = tl.load(zero + plane, channel < HEAD_DIM, 0.0).to(tl.float32)[None, :]
                base = tl.broadcast_to(base, [ROWS, WIDTH])
        if ZERO:
            x = x - base
        # x / step, correctly rounded as by a division, from one division a group; a number that
        # is clipped anyway needs no correction, and might not be finite in it.
        scaled = x * inverse
        fixed = tl.math.fma(tl.math.fma(-scaled, step, x), inverse, scaled)
        scaled = tl.where(tl.abs(scaled) < 1024.0, fixed, scaled)
        # Clipping to whole numbers first changes no code, and keeps the rounding in its range.
        scaled = tl.where(scaled > QMAX, QMAX, tl.where(scaled < LOW, LOW, scaled))
        if CODE == 2:
            byte, number = _e4m3(scaled)
        else:
            shifted = scaled + _ROUND
            number = shifted - _ROUND
            # The integer stands in the low mantissa bits.
            byte = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        if CODE == 3:
            low_half, high_half = tl.split(tl.reshape(byte + 8, [ROWS, WIDTH // 2, 2]))
            pair = tl.arange(0, WIDTH // 2)
            to = codes + (at + slot * (HEAD_DIM // 2))[:, None] + pair[None, :]
            packed = (low_half | (high_half << 4)).to(codes.dtype.element_ty)
            tl.store(to, packed, keep[:, None] & (pair < HEAD_DIM // 2)[None, :])
        else:
            to = codes + (at + slot * HEAD_DIM)[:, None] + channel[None, :]
            tl.store(to, byte.to(codes.dtype.element_ty), keep[:, None] & inside)
        if RETURN:
            number = number * step + base
    if RETURN:
        tl.store(seen[:, None] + channel[None, :], number.to(seen.dtype.element_ty),
                 real[:, None] & inside)  # fmt: skip
