"""Rows whose codes lie in planes (int6, int3): a code a byte in registers, in the channels' order.

A row is the low bits of all its channels and then their high ones (formats/spec's ``fields``). It
falls into blocks of neighbouring channels, four of int6 and eight of int3: block b has its high
bits in field b of each byte of the high plane, and its low bits in field b // 2 of one half of the
low plane, the first if b is even. So every block takes the same bytes, shifted: what is loaded once
is repeated in registers, and a shift and a mask for four codes give words as int8 has them.
"""

import triton
import triton.language as tl

from quantpage.formats import CODES
from quantpage.ops.operand import CODE_KINDS
from quantpage.ops.triton.common import INT6, INTERPRETED, Constant

_FIELDS = {kind: CODES[name].fields for name, kind in CODE_KINDS.items() if CODES[name].fields}


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
def _beside(x, y):
    """Two tiles side by side. What a load gives a thread stays its own in a join; a broadcast
    begins with a layout of its own, a channel a thread.
    """
    both = tl.permute(tl.join(x, y), (0, 2, 1))
    return tl.reshape(both, [x.shape[0], 2 * x.shape[1]])


@triton.jit
def load_bytes(rows, shown, D: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """Codes of rows plus ``half_range``, a byte each: an int32 tile [keys, WIDTH] of four channels
    in order, or of one where rows are no whole words and come as bytes.

    rows: pointers to them, [keys, 1]. shown: which are loaded, of the same shape, if MASKED. WIDTH:
    elements of a row of the tile, of which the first that D channels need are theirs.
    """
    SIZE: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth // 8
    BLOCKS: tl.constexpr = 8 // high_bits(CODE)
    # Elements of a block.
    EACH: tl.constexpr = D // (BLOCKS * SIZE)
    LOW: tl.constexpr = low_bits(CODE)
    if WIDTH == BLOCKS * EACH:
        low_at = tl.arange(0, 2 * EACH)[None, :]
        high_at = 2 * EACH + tl.arange(0, EACH)[None, :]
        low = _load(rows, low_at, shown, MASKED).to(tl.int32)
        high = _load(rows, high_at, shown, MASKED).to(tl.int32)
        if CODE == INT6:
            low = _beside(low, low >> 4)
            high = _beside(_beside(high << 4, high << 2), _beside(high, high >> 2))
        else:
            low = _beside(_beside(low, low >> 2), _beside(low >> 4, low >> 6))
            first = _beside(_beside(high << 2, high << 1), _beside(high, high >> 1))
            last = _beside(_beside(high >> 2, high >> 3), _beside(high >> 4, high >> 5))
            high = _beside(first, last)
    else:
        # Blocks that are no power of two: what they share is loaded for each.
        at = tl.arange(0, WIDTH)[None, :]
        block = at // EACH
        inside = block < BLOCKS
        shown = shown & inside if MASKED else inside
        low = _load(rows, block % 2 * EACH + at % EACH, shown, True).to(tl.int32)
        high = _load(rows, 2 * EACH + at % EACH, shown, True).to(tl.int32)
        low >>= block // 2 * LOW
        right = block * high_bits(CODE) - LOW
        high = tl.where(right < 0, high << tl.maximum(-right, 0), high >> tl.maximum(right, 0))
    LOWS: tl.constexpr = each_byte((1 << LOW) - 1)
    HIGHS: tl.constexpr = each_byte(((1 << high_bits(CODE)) - 1) << LOW)
    return (low & LOWS) | (high & HIGHS)


@triton.jit
def _load(rows, at, shown, MASKED: tl.constexpr):
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
    codes = load_bytes(rows, shown, D, WIDTH // SIZE, CODE, MASKED)
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
        number = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        if D < WIDTH:
            # With nothing between them Triton 3.6 moves the reshape of ``interleave`` behind the
            # copy to shared memory, where it has no layout for such rows and fails to compile.
            number = tl.where((tl.arange(0, WIDTH) < D)[None, :], number, 0.0)
        return number
