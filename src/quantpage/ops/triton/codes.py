"""Tiles of codes as float16 tensors of the same order: what a 64- to 128-row matrix product reads.

Four bytes of a register become four float16 with 5 instructions (int8), 2 (fp8) or 11 for eight
4-bit codes; Triton's own casts of int8 take one slow conversion a value. Every code is exact in
float16. The interpreter runs the same arithmetic as shifts.
"""

import triton
import triton.language as tl

from quantpage.formats import CODES
from quantpage.ops.operand import CODE_KINDS
from quantpage.ops.triton.common import FP8, INT8, INTERPRETED, Constant
from quantpage.ops.triton.planes import in_planes, plane_row

# xor moves -128..127 to 0..255; 0x6400 | byte is the float16 1024 + byte.
_INT8 = Constant("""{
 .reg .b32 x, magic, bias, t;
 mov.b32 magic, 0x64646464; mov.b32 bias, 0x64806480;
 xor.b32 x, $2, 0x80808080;
 prmt.b32 t, x, magic, 0x4140; sub.f16x2 $0, t, bias;
 prmt.b32 t, x, magic, 0x4342; sub.f16x2 $1, t, bias;
}""")
_FP8 = Constant("""{
 .reg .b16 a, b;
 mov.b32 {a, b}, $2;
 cvt.rn.f16x2.e4m3x2 $0, a;
 cvt.rn.f16x2.e4m3x2 $1, b;
}""")
# Low nibbles first, then high ones; 0x6408 is 1024 + 8.
INT4_ASM = Constant("""{
 .reg .b32 x, magic, bias, t;
 mov.b32 magic, 0x64646464; mov.b32 bias, 0x64086408;
 and.b32 x, $4, 0x0f0f0f0f;
 prmt.b32 t, x, magic, 0x4140; sub.f16x2 $0, t, bias;
 prmt.b32 t, x, magic, 0x4342; sub.f16x2 $1, t, bias;
 shr.u32 x, $4, 4; and.b32 x, x, 0x0f0f0f0f;
 prmt.b32 t, x, magic, 0x4140; sub.f16x2 $2, t, bias;
 prmt.b32 t, x, magic, 0x4342; sub.f16x2 $3, t, bias;
}""")


@triton.jit
def to_float16(codes, CODE: tl.constexpr, OLD: tl.constexpr):
    """Bytes of codes -> float16: 1 int8, 2 e4m3 as uint8, 3 pairs of 4 bits, twice as wide.

    OLD: no e4m3 conversion instruction (before sm_89).
    """
    if CODE == INT8:
        if INTERPRETED:
            number = codes.to(tl.float16)
        else:
            number = tl.inline_asm_elementwise(
                _INT8, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            )
    elif CODE == FP8:
        if INTERPRETED or OLD:
            # The exponent's bias is 7 in e4m3 and 15 in float16: move the bits, multiply by 2^8.
            size = ((codes.to(tl.int16) & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
            number = tl.where(codes < 128, size, -size)
        else:
            number = tl.inline_asm_elementwise(
                _FP8, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            )
    else:
        if INTERPRETED:
            low = ((codes & 15).to(tl.int8) - 8).to(tl.float16)
            high = ((codes >> 4).to(tl.int8) - 8).to(tl.float16)
        else:
            low, high = tl.inline_asm_elementwise(
                INT4_ASM,
                "=r,=r,=r,=r,r",
                [codes],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
        number = tl.interleave(low, high)
    return number


@triton.constexpr_function
def row_of(channels, code, size):
    """Elements of ``size`` bytes that a row of codes takes; of numbers as they come, channels."""
    if in_planes(code):
        return plane_row(channels, code, size)
    return channels // 2 if code == CODE_KINDS["int4"] else channels


_CODES = {kind: CODES[name] for name, kind in CODE_KINDS.items()}


@triton.constexpr_function
def largest(code):
    """Of a code's numbers."""
    return float(_CODES[code].qmax)


@triton.constexpr_function
def smallest(code):
    """Of a code's numbers, where it has a zero point."""
    return float(_CODES[code].qmin)


@triton.constexpr_function
def lift(code):
    """What is added to a number's code before its bits are packed with others'."""
    packed = code == CODE_KINDS["int4"] or in_planes(code)
    return -_CODES[code].qmin if packed else 0.0
