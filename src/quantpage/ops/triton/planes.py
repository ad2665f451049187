"""Rows whose codes lie in planes (int6, int3): a code a byte in registers, in the channels' order.

A row is the low bits of all its channels and then their high ones (formats/spec's ``fields``). It
falls into blocks of neighbouring channels, four of int6 and eight of int3: block b has its high
bits in field b of each byte of the high plane, and its low bits in field b // 2 of one half of the
low plane, the first if b is even. So every block takes the same bytes, shifted: what is loaded once
is repeated in registers, and a shift and a mask for four codes give words as int8 has them.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from quantpage.formats import CODES
from quantpage.ops.operand import CODE_KINDS
from quantpage.ops.triton.common import INT6, INTERPRETED, Constant

_FIELDS = {CODE_KINDS[name]: code.fields for name, code in CODES.items() if code.fields}


@triton.constexpr_function
def in_planes(code):
    """Whether a code's rows are planes."""
    return code in _FIELDS


@triton.constexpr_function
def low_bits(code):
    """Bits of a code in the low plane."""
    return _FIELDS[code][0]


@triton.constexpr_function
def high_bits(code):
    """Bits of a code in the high plane."""
    return _FIELDS[code][1]


@triton.constexpr_function
def half_range(code):
    """What codes are stored plus."""
    return 1 << (sum(_FIELDS[code]) - 1)


@triton.constexpr_function
def each_byte(bits):
    """A mask of a byte in all four of a word, as an int32."""
    word = bits * 0x01010101
    return word - (1 << 32) if word >> 31 else word


@triton.constexpr_function
def plane_row(channels, code, size):
    """Elements of ``size`` bytes that a row takes."""
    return channels * sum(_FIELDS[code]) // (8 * size)


@triton.jit
def _repeated(x, TIMES: tl.constexpr, AXIS: tl.constexpr):
    """A tile so many times along an axis."""
    ROWS: tl.constexpr = x.shape[1 - AXIS]
    LENGTH: tl.constexpr = x.shape[AXIS]
    if AXIS == 1:
        x = tl.broadcast_to(x[:, None, :], [ROWS, TIMES, LENGTH])
        return tl.reshape(x, [ROWS, TIMES * LENGTH])
    else:
        x = tl.broadcast_to(x[None, :, :], [TIMES, LENGTH, ROWS])
        return tl.reshape(x, [TIMES * LENGTH, ROWS])


@triton.jit
def load_bytes(rows, shown, D: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr,
               MASKED: tl.constexpr, AXIS: tl.constexpr):  # fmt: skip
    """Codes of rows, stored as they are, a byte each: int32 tiles of four channels in order, or of
    one where rows are no whole words and come as bytes.

    rows: pointers to them, [keys, 1] with channels along AXIS 1, or [1, keys] with channels along
    AXIS 0. shown: which are loaded, of the same shape, if MASKED. WIDTH: elements of a row of the
    tile, of which the first that D channels need are theirs.
    """
    SIZE: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    BLOCKS: tl.constexpr = 8 // high_bits(CODE)
    # Elements of a block.
    EACH: tl.constexpr = D // (BLOCKS * SIZE)
    at = tl.arange(0, WIDTH)
    block = at // EACH
    if WIDTH == BLOCKS * EACH:
        low_at = tl.arange(0, 2 * EACH)
        high_at = tl.arange(0, EACH)
        low = _load(rows, low_at, shown, MASKED, AXIS)
        high = _load(rows, 2 * EACH + high_at, shown, MASKED, AXIS)
        low = _repeated(low, BLOCKS // 2, AXIS)
        high = _repeated(high, BLOCKS, AXIS)
    else:
        # Blocks that are no power of two: what they share is loaded for each.
        inside = tl.expand_dims(block < BLOCKS, 1 - AXIS)
        shown = shown & inside if MASKED else inside
        low = _load(rows, block % 2 * EACH + at % EACH, shown, True, AXIS)
        high = _load(rows, 2 * EACH + at % EACH, shown, True, AXIS)
    block = tl.expand_dims(block, 1 - AXIS)
    LOW: tl.constexpr = low_bits(CODE)
    LOWS: tl.constexpr = each_byte((1 << LOW) - 1)
    HIGHS: tl.constexpr = each_byte(((1 << high_bits(CODE)) - 1) << LOW)
    # Constants of a register, since a tile's layout has blocks in registers of their own.
    low = low.to(tl.int32) >> (block // 2 * LOW)
    right = block * high_bits(CODE) - LOW
    high = high.to(tl.int32)
    high = tl.where(right < 0, high << tl.maximum(-right, 0), high >> tl.maximum(right, 0))
    return (low & LOWS) | (high & HIGHS)


@triton.jit
def _load(rows, at, shown, MASKED: tl.constexpr, AXIS: tl.constexpr):
    at = tl.expand_dims(at, 1 - AXIS)
    if MASKED:
        return tl.load(rows + at, shown, 0)
    else:
        return tl.load(rows + at)


# A code is a byte n of a word; 0x6400 | n is the float16 1024 + n.
_INT6_ASM = Constant("""{
 .reg .b32 magic, bias, t;
 mov.b32 magic, 0x64646464; mov.b32 bias, 0x64206420;
 prmt.b32 t, $4, magic, 0x4140; sub.f16x2 t, t, bias; mov.b32 {$0, $1}, t;
 prmt.b32 t, $4, magic, 0x4342; sub.f16x2 t, t, bias; mov.b32 {$2, $3}, t;
}""")
_INT3_ASM = Constant(_INT6_ASM.value.replace("0x64206420", "0x64046404"))


@triton.jit
def plane_numbers(rows, shown, D: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr,
                  MASKED: tl.constexpr):  # fmt: skip
    """Codes of rows as float16 [keys, WIDTH], in which they are exact; arguments of load_bytes."""
    SIZE: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    codes = load_bytes(rows, shown, D, WIDTH // SIZE, CODE, MASKED, 1)
    if SIZE == 1:
        return (codes - half_range(CODE)).to(tl.float16)
    else:
        if INTERPRETED:
            a = ((codes & 255) - half_range(CODE)).to(tl.float16)
            b = ((codes >> 8 & 255) - half_range(CODE)).to(tl.float16)
            c = ((codes >> 16 & 255) - half_range(CODE)).to(tl.float16)
            d = ((codes >> 24 & 255) - half_range(CODE)).to(tl.float16)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _INT6_ASM if CODE == INT6 else _INT3_ASM, "=h,=h,=h,=h,r", [codes],
                dtype=(tl.float16,) * 4, is_pure=True, pack=1,
            )  # fmt: skip
        four = tl.join(tl.join(a, c), tl.join(b, d))
        return tl.reshape(four, [codes.shape[0], WIDTH])


@triton.jit
def store_planes(to, parts, keep, D: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
                 CODE: tl.constexpr):  # fmt: skip
    """Codes plus ``half_range``, in the low bits of the pieces [ROWS, PIECE] of rows, as planes.

    to: bytes where the rows begin, [ROWS, 1]. keep: which are stored, [ROWS]. One piece where D is
    no power of two.
    """
    LOW: tl.constexpr = low_bits(CODE)
    low = ()
    high = ()
    for i in tl.static_range(len(parts)):
        low = low + (parts[i] & ((1 << LOW) - 1),)
        high = high + ((parts[i] >> LOW) & ((1 << high_bits(CODE)) - 1),)
    _store_plane(to, low, keep, D, PIECE, ROWS, LOW)
    _store_plane(to + D * LOW // 8, high, keep, D, PIECE, ROWS, high_bits(CODE))


@triton.jit
def _store_plane(to, parts, keep, D: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr,
                 BITS: tl.constexpr):  # fmt: skip
    """One plane: a byte has channels that are D * BITS / 8 apart, from its lowest bits up."""
    EACH: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = D // EACH
    COUNT: tl.constexpr = len(parts)
    if D < COUNT * PIECE:
        tl.static_assert(COUNT == 1)
        WIDTH: tl.constexpr = triton.next_power_of_2(BYTES)
        byte_at = tl.arange(0, WIDTH)
        byte = tl.zeros([ROWS, WIDTH], tl.int32)
        for i in tl.static_range(EACH):
            channel = tl.minimum(i * BYTES + byte_at, PIECE - 1)
            channel = tl.broadcast_to(channel[None, :], [ROWS, WIDTH])
            byte |= tl.gather(parts[0], channel, 1) << (BITS * i)
        inside = keep[:, None] & (byte_at < BYTES)[None, :]
        tl.store(to + byte_at[None, :], byte.to(tl.uint8), inside)
    elif COUNT >= EACH:
        # All of a byte's channels are a thread's own.
        APART: tl.constexpr = COUNT // EACH
        for piece in tl.static_range(APART):
            byte = parts[piece]
            for i in tl.static_range(1, EACH):
                byte |= parts[piece + i * APART] << (BITS * i)
            byte_at = piece * PIECE + tl.arange(0, PIECE)
            tl.store(to + byte_at[None, :], byte.to(tl.uint8), keep[:, None])
    else:
        # As many of them as there are pieces, and the others by a sum: bits do not overlap.
        INNER: tl.constexpr = EACH // COUNT
        byte = parts[0]
        for i in tl.static_range(1, COUNT):
            byte |= parts[i] << (BITS * INNER * i)
        shift = BITS * tl.arange(0, INNER)[None, :, None]
        byte = tl.sum(tl.reshape(byte, [ROWS, INNER, PIECE // INNER]) << shift, 1)
        byte_at = tl.arange(0, PIECE // INNER)
        tl.store(to + byte_at[None, :], byte.to(tl.uint8), keep[:, None])
