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

from quantpage.ops.rope_write.triton_planes import store_planes
from quantpage.ops.triton.codes import largest, lift, row_of, smallest
from quantpage.ops.triton.common import A_TOKEN, FP8, INT4, NONE, STATIC, Constant
from quantpage.ops.triton.planes import in_planes

_ROUND = Constant(12582912.0)
_FLOAT_MAX = Constant(3.4028234663852886e38)


@triton.jit
def finite(x):
    """formats/quantize's ``finite``."""
    x = tl.where(x == x, x, 0.0)
    return tl.where(x > _FLOAT_MAX, _FLOAT_MAX, tl.where(x < -_FLOAT_MAX, -_FLOAT_MAX, x))


@triton.jit
def larger(a, b):
    """NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """NaN where one is."""
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
            high = larger(high, above[i])
            low = smaller(low, below[i])
        low = tl.reduce(tl.reshape(low, [ROWS, GROUPS, PIECE // GROUPS]), 2, smaller)
        return tl.reduce(tl.reshape(high, [ROWS, GROUPS, PIECE // GROUPS]), 2, larger), low
    else:
        high = tl.abs(parts[0])
        for i in tl.static_range(1, len(parts)):
            high = larger(high, tl.abs(parts[i]))
        high = tl.reduce(tl.reshape(high, [ROWS, GROUPS, PIECE // GROUPS]), 2, larger)
        return high, -high


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
def _divided(x, BY: tl.constexpr, LIMIT: tl.constexpr):
    """x / BY to the last bit; of quotients that float16 rounds to 0, about."""
    if LIMIT < 65536.0:
        quotient = x * (1.0 / BY)
        return tl.math.fma(tl.math.fma(-quotient, BY, x), 1.0 / BY, quotient)
    else:
        return tl.math.div_rn(x, x * 0.0 + BY)


@triton.jit
def _floored(step, LIMIT: tl.constexpr):
    """formats/quantize's ``smallest_scale`` in place of scales that rounded to less; keeps NaN."""
    least: tl.constexpr = 2.0**-24 if LIMIT < 65536.0 else 2.0**-126
    return tl.where(step < least, least, step)


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
        span = _divided(high * 0.5 - low * 0.5, QMAX - QMIN, LIMIT) * 2.0
        step = _floored(_rounded(span, LIMIT, scale), LIMIT)
        base = _rounded(low - QMIN * step, LIMIT, zero)
    else:
        step = _floored(_rounded(_divided(high, QMAX, LIMIT), LIMIT, scale), LIMIT)
        base = step * 0.0
    return step, base


@triton.jit
def rounded_scales(
    high, low, factor, rest, scale, zero, ZERO: tl.constexpr, QMAX: tl.constexpr,
    QMIN: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """formats/quantize's ``rounded_range``, as float32; rest: 1 - factor."""
    if ZERO:
        half = high * 0.5 - low * 0.5
        span = _divided(half * factor, QMAX - QMIN, LIMIT) * 2.0
        step = _floored(_rounded(span, LIMIT, scale), LIMIT)
        base = _rounded(low + half * rest - QMIN * step, LIMIT, zero)
    else:
        step = _floored(_rounded(_divided(high * factor, QMAX, LIMIT), LIMIT, scale), LIMIT)
        base = step * 0.0
    return step, base


@triton.jit
def _in_range(
    high, low, step, base, ZERO: tl.constexpr, QMAX: tl.constexpr, LOW: tl.constexpr,
    TAME: tl.constexpr,
):  # fmt: skip
    """Whether groups hold numbers only; TAME: and none is clipped. False for a NaN."""
    if TAME and ZERO:
        fine = (high - base <= (QMAX + 0.25) * step) & (low - base >= (LOW - 0.25) * step)
        # Groups of padding are (-inf, inf).
        return fine | (high < low)
    elif TAME:
        return high <= QMAX * 1.001 * step
    else:
        return (high <= _FLOAT_MAX) & (low >= -_FLOAT_MAX)


@triton.jit
def _held(
    parts, scale, zero, ZERO: tl.constexpr, DYNAMIC: tl.constexpr, QMAX: tl.constexpr,
    QMIN: tl.constexpr, LOW: tl.constexpr, LIMIT: tl.constexpr, TAME: tl.constexpr,
    GAIN: tl.constexpr, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Pieces with NaN as 0 and infinities as the largest number; scale and zero of groups.

    Hardly any tile needs the change: the extremes, needed anyway, decide for all of it. TAME: so
    they do for clipping. A piece times ``gain``, GAIN where nothing was changed, is what it stands
    for.
    """
    high, low = _extremes(parts, ZERO, HEAD_DIM, PIECE, ROWS, GROUPS)
    high *= GAIN
    low *= GAIN
    gain = high * 0.0 + GAIN
    step = gain
    base = gain
    if DYNAMIC:
        step, base = _scales(high, low, scale, zero, ZERO, QMAX, QMIN, LIMIT)
    fine = _in_range(high, low, step, base, ZERO, QMAX, LOW, TAME)
    if tl.max(tl.max(tl.where(fine, 0, 1), 1), 0) != 0:
        fixed = ()
        for i in tl.static_range(len(parts)):
            fixed = fixed + (finite(parts[i] * GAIN),)
        parts = fixed
        gain = tl.full([ROWS, GROUPS], 1.0, tl.float32)
        high, low = _extremes(parts, ZERO, HEAD_DIM, PIECE, ROWS, GROUPS)
        if DYNAMIC:
            step, base = _scales(high, low, scale, zero, ZERO, QMAX, QMIN, LIMIT)
        if TAME:
            above = _spread(base + QMAX * step, ROWS, GROUPS, PIECE)
            below = _spread(base + LOW * step, ROWS, GROUPS, PIECE)
            clipped = ()
            for i in tl.static_range(len(parts)):
                clipped = clipped + (tl.minimum(tl.maximum(parts[i], below), above),)
            parts = clipped
    return parts, step, base, gain


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
    """Codes in the low bits of integers (plus ``lift``), and the numbers they stand for.

    TAME: x / step is finite and none is clipped. HARDWARE: the device converts to e4m3; numbers
    are not handed back.
    """
    if ZERO:
        x = x - base
    # x / step, correctly rounded as by a division, from one division a group; a number that is
    # clipped anyway needs no correction, and might not be finite in it.
    quotient = x * inverse
    exact = tl.math.fma(tl.math.fma(-quotient, step, x), inverse, quotient)
    if not TAME:
        exact = tl.where(tl.abs(quotient) < 1024.0, exact, quotient)
        # Clipping to whole numbers first changes no code, and keeps the rounding in its range.
        exact = tl.minimum(tl.maximum(exact, LOW), QMAX)
    if CODE == FP8:
        if HARDWARE:
            # Reading the converted pair back is miscompiled by ptxas 12.8: within a loop it gives
            # the pair of the iteration before. So whoever wants numbers rounds by hand.
            return exact.to(tl.float8e4nv).to(tl.uint8, bitcast=True), exact
        else:
            return _e4m3(exact)
    else:
        ROUND: tl.constexpr = _ROUND + lift(CODE)
        shifted = exact + ROUND
        return shifted.to(tl.int32, bitcast=True), shifted - ROUND


@triton.jit
def _near_code_of(
    x, inverse, offset, CODE: tl.constexpr, ZERO: tl.constexpr, QMAX: tl.constexpr,
    LOW: tl.constexpr, TAME: tl.constexpr,
):  # fmt: skip
    """As ``_code_of`` in integers, from rint(x * inverse + offset).

    A last bit off the quotient moves a code where that is a rounding away from a tie, which the
    order of a rotation's sums does as well.
    """
    ROUND: tl.constexpr = _ROUND + lift(CODE)
    shifted = tl.math.fma(x, inverse, offset) + ROUND if ZERO else tl.math.fma(x, inverse, ROUND)
    if not TAME:
        shifted = tl.minimum(tl.maximum(shifted, LOW + ROUND), QMAX + ROUND)
    return shifted.to(tl.int32, bitcast=True), shifted - ROUND


@triton.jit
def scaled(parts, factor: tl.constexpr):
    """Pieces times a number."""
    done = ()
    for i in tl.static_range(len(parts)):
        done = done + (parts[i] * factor,)
    return done


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
    """Scatter rows beside their codes, finite as those (formats/quantize's ``finite_rows``)."""
    number: tl.constexpr = pages.dtype.element_ty
    HALF: tl.constexpr = 65504.0 if number == tl.float16 else _FLOAT_MAX
    MOST: tl.constexpr = 3.3895313892515355e38 if number == tl.bfloat16 else HALF
    held = ()
    for i in tl.static_range(len(parts)):
        known = tl.where(parts[i] == parts[i], parts[i], 0.0)
        held = held + (tl.minimum(tl.maximum(known, -MOST), MOST),)
    scatter(held, slots, head, pages, page_stride, head_stride, HEAD_DIM, PIECE, PAGE)


@triton.jit
def scatter(
    parts, slots, head, pages, page_stride, head_stride, HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rows as they are to their slots, int64; negative ones are left out. head: int64."""
    slot = tl.maximum(slots, 0)
    at = slot // PAGE * page_stride + head * head_stride + slot % PAGE * HEAD_DIM
    store_parts(pages + at, parts, slots >= 0, HEAD_DIM, PIECE)


@triton.jit
def write_near(
    parts, slots, head, pages, CODE: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr, HARDWARE: tl.constexpr, NEAR: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Exact pages that are codes (``KVFormat.near``): most tiles of a prompt have no row there."""
    if tl.max(slots, 0) >= 0:
        write_rows(
            parts, slots >= 0, slots, head, pages.codes, pages.scale, pages.zero, pages.page,
            pages.head, pages.scale_page, pages.scale_head, pages.codes,
            CODE, A_TOKEN, ZERO, SHARED, HEAD_DIM, PIECE, PAGE, ROWS, LIMIT, HARDWARE, False, NEAR,
            GAIN,
        )  # fmt: skip


@triton.jit
def write_rows(
    parts, real, slots, head, codes, scale, zero, page_stride, head_stride, scale_page,
    scale_head, seen,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr, HARDWARE: tl.constexpr, RETURN: tl.constexpr, NEAR: tl.constexpr,
    GAIN: tl.constexpr,
):  # fmt: skip
    """Quantize rows and scatter them; the round-tripped rows go to ``seen``.

    SCALES: 0 none, 1 dynamic, 2 static. SHARED: channels that share a scale (dynamic: at least
    HEAD_DIM for all of them, else a power of two, and rows are one piece). HARDWARE: the device
    converts to e4m3. NEAR: the rows are sums, whose last bits are nobody's promise. GAIN: what
    the pieces are to be multiplied with.
    """
    if CODE == NONE:
        parts = scaled(parts, GAIN)
        scatter(parts, slots, head, codes, page_stride, head_stride, HEAD_DIM, PIECE, PAGE)
        numbers = parts
    else:
        numbers = _write_codes(
            parts, slots, head, codes, scale, zero, page_stride, head_stride, scale_page,
            scale_head, CODE, SCALES, ZERO, SHARED, HEAD_DIM, PIECE, PAGE, ROWS, LIMIT,
            HARDWARE and not RETURN, NEAR and CODE != FP8 and LIMIT < 65536.0, GAIN,
        )  # fmt: skip
    if RETURN:
        store_parts(seen, numbers, real, HEAD_DIM, PIECE)


@triton.jit
def _write_codes(
    parts, slots, head, codes, scale, zero, page_stride, head_stride, scale_page, scale_head,
    CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr, HARDWARE: tl.constexpr, NEAR: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """Codes and dynamic scales of rows; the pieces as they read back."""
    keep = slots >= 0
    page = tl.maximum(slots, 0) // PAGE
    slot = tl.maximum(slots, 0) % PAGE
    at = page * page_stride + head * head_stride
    QMAX: tl.constexpr = largest(CODE)
    QMIN: tl.constexpr = smallest(CODE)
    LOW: tl.constexpr = QMIN if ZERO else -QMAX
    GROUPS: tl.constexpr = PIECE // SHARED if SCALES == A_TOKEN and SHARED < HEAD_DIM else 1
    # A scale of 16 bits that was computed from these rows: quotients are finite, and clipped
    # only where the scale is subnormal or the largest there is.
    TAME: tl.constexpr = SCALES == A_TOKEN and LIMIT < 65536.0
    if not NEAR:
        parts = scaled(parts, GAIN)
    LEFT: tl.constexpr = GAIN if NEAR else 1.0
    parts, step, base, gain = _held(
        parts, scale, zero, ZERO and SCALES == A_TOKEN, SCALES == A_TOKEN, QMAX, QMIN, LOW, LIMIT,
        TAME, LEFT, HEAD_DIM, PIECE, ROWS, GROUPS,
    )  # fmt: skip
    if SCALES == A_TOKEN:
        group = tl.arange(0, GROUPS)
        HELD: tl.constexpr = HEAD_DIM // SHARED if SHARED < HEAD_DIM else 1
        plane = page * scale_page + head * scale_head + slot * HELD
        plane = plane[:, None] + group[None, :]
        mask = keep[:, None] & (group < HELD)[None, :]
        tl.store(scale + plane, step.to(scale.dtype.element_ty), mask)
        if ZERO:
            tl.store(zero + plane, base.to(zero.dtype.element_ty), mask)
        if NEAR:
            inverse = 1.0 / step
            offset = _spread(-base * inverse, ROWS, GROUPS, PIECE)
            inverse = _spread(inverse * gain, ROWS, GROUPS, PIECE)
        else:
            offset = step
            inverse = _spread(tl.math.div_rn(step * 0.0 + 1.0, step), ROWS, GROUPS, PIECE)
        step = _spread(step, ROWS, GROUPS, PIECE)
        base = _spread(base, ROWS, GROUPS, PIECE)
    else:
        gain = _spread(gain, ROWS, GROUPS, PIECE)
    to = codes + (at + slot * row_of(HEAD_DIM, CODE, 1))[:, None]
    numbers = ()
    planed = ()
    for i in tl.static_range(len(parts)):
        if SCALES == STATIC:
            step, inverse, base = _given(
                scale, zero, head * scale_head, i * PIECE, ZERO, SHARED, HEAD_DIM, PIECE, ROWS
            )
            offset = -base * inverse
            inverse = inverse * gain
        if NEAR:
            byte, number = _near_code_of(parts[i], inverse, offset, CODE, ZERO, QMAX, LOW, TAME)
        else:
            byte, number = _code_of(
                parts[i], step, inverse, base, CODE, ZERO, QMAX, LOW, TAME, HARDWARE
            )
        numbers = numbers + (number * step + base,)
        if in_planes(CODE):
            planed = planed + (byte,)
        else:
            _store_piece(to, byte, keep, i, HEAD_DIM, PIECE, ROWS, CODE)
    if in_planes(CODE):
        store_planes(to, planed, keep, HEAD_DIM, PIECE, ROWS, CODE)
    return numbers


@triton.jit
def store_codes(
    to, parts, keep, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Codes plus ``lift`` of rows that begin at ``to`` [ROWS, 1], where ``keep``."""
    if in_planes(CODE):
        store_planes(to, parts, keep, HEAD_DIM, PIECE, ROWS, CODE)
    else:
        for i in tl.static_range(len(parts)):
            _store_piece(to, parts[i], keep, i, HEAD_DIM, PIECE, ROWS, CODE)


@triton.jit
def _store_piece(
    to, byte, keep, i: tl.constexpr, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr,
    ROWS: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Piece number i of them, where codes are not in planes."""
    PER: tl.constexpr = 2 if CODE == INT4 else 1
    if CODE == INT4:
        first, second = tl.split(tl.reshape(byte, [ROWS, PIECE // 2, 2]))
        byte = first + (second << 4)
    channel = i * (PIECE // PER) + tl.arange(0, PIECE // PER)
    mask = keep[:, None]
    if (i + 1) * PIECE > HEAD_DIM:
        mask = mask & (channel < HEAD_DIM // PER)[None, :]
    tl.store(to + channel[None, :], byte.to(to.dtype.element_ty), mask)


@triton.jit
def _given(
    scale, zero, head_at, first, ZERO: tl.constexpr, SHARED: tl.constexpr, HEAD_DIM: tl.constexpr,
    PIECE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Static scales of a piece from channel ``first`` on, their inverses, and zeros."""
    # One of a head: the same number, and one division, for every piece.
    WIDTH: tl.constexpr = 1 if SHARED >= HEAD_DIM else PIECE
    channel = (first if SHARED < HEAD_DIM else 0) + tl.arange(0, WIDTH)
    plane = head_at[:, None] + (channel // SHARED)[None, :]
    inside = (channel < HEAD_DIM)[None, :]
    step = tl.load(scale + plane, inside, 1.0).to(tl.float32)
    inverse = tl.broadcast_to(tl.math.div_rn(step * 0.0 + 1.0, step), [ROWS, PIECE])
    base = step * 0.0
    if ZERO:
        base = tl.load(zero + plane, inside, 0.0).to(tl.float32)
    step = tl.broadcast_to(step, [ROWS, PIECE])
    return step, inverse, tl.broadcast_to(base, [ROWS, PIECE])
