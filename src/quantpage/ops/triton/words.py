"""Codes read as 32-bit words and turned into float16 operands of the tensor cores.

Triton loads an 8-bit operand of a 16-row product byte by byte from shared memory, which stalls on
instructions long before the memory is busy (0.20 to 0.45 warp instructions a KV byte). Words of
four codes load sixteen bytes at a time; here two words (two tokens, or two neighbours along the
product's inner dimension) become the halves of four or eight registers:

    words a, b  ->  (a.0, b.0) (a.1, b.1) (a.2, b.2) (a.3, b.3)     as float16 pairs

Output r holds channels r, 4 + r, 8 + r, ... (8-bit) or r, 8 + r, ... (4-bit): the product over
channels is a sum of four or eight products with queries that are strided the same way. Codes in
planes are read as ops/triton/planes says. Every code is exact in float16. Inline PTX is the fast
way; the interpreter runs the same arithmetic as shifts.
"""

import triton
import triton.language as tl

from quantpage.ops.triton.common import INT8, INTERPRETED, Constant

# xor moves -128..127 to 0..255; 0x6400 | byte is the float16 1024 + byte.
INT8_ASM = Constant("""{
 .reg .b32 a, b, x, y, magic, bias, t;
 mov.b32 magic, 0x64646464; mov.b32 bias, 0x64806480;
 xor.b32 a, $4, 0x80808080; xor.b32 b, $5, 0x80808080;
 prmt.b32 x, a, b, 0x5140;
 prmt.b32 y, a, b, 0x7362;
 prmt.b32 t, x, magic, 0x4140; sub.f16x2 $0, t, bias;
 prmt.b32 t, x, magic, 0x4342; sub.f16x2 $1, t, bias;
 prmt.b32 t, y, magic, 0x4140; sub.f16x2 $2, t, bias;
 prmt.b32 t, y, magic, 0x4342; sub.f16x2 $3, t, bias;
}""")
FP8_ASM = Constant("""{
 .reg .b32 x, y; .reg .b16 a, b, c, d;
 prmt.b32 x, $4, $5, 0x5140;
 prmt.b32 y, $4, $5, 0x7362;
 mov.b32 {a, b}, x; mov.b32 {c, d}, y;
 cvt.rn.f16x2.e4m3x2 $0, a;
 cvt.rn.f16x2.e4m3x2 $1, b;
 cvt.rn.f16x2.e4m3x2 $2, c;
 cvt.rn.f16x2.e4m3x2 $3, d;
}""")
# Before sm_89: the byte's exponent moved to float16's place, times 2^8 for the biases' difference.
_FP8_SM80 = Constant("""{
 .reg .b32 x, y, k, z, t, s;
 mov.b32 k, 0x5c005c00; mov.b32 z, 0;
 prmt.b32 x, $4, $5, 0x5140;
 prmt.b32 y, $4, $5, 0x7362;
 prmt.b32 t, x, z, 0x1404; and.b32 s, t, 0x80008000; shr.u32 t, t, 1;
 lop3.b32 t, t, 0x3f803f80, s, 0xea; mul.f16x2 $0, t, k;
 prmt.b32 t, x, z, 0x3424; and.b32 s, t, 0x80008000; shr.u32 t, t, 1;
 lop3.b32 t, t, 0x3f803f80, s, 0xea; mul.f16x2 $1, t, k;
 prmt.b32 t, y, z, 0x1404; and.b32 s, t, 0x80008000; shr.u32 t, t, 1;
 lop3.b32 t, t, 0x3f803f80, s, 0xea; mul.f16x2 $2, t, k;
 prmt.b32 t, y, z, 0x3424; and.b32 s, t, 0x80008000; shr.u32 t, t, 1;
 lop3.b32 t, t, 0x3f803f80, s, 0xea; mul.f16x2 $3, t, k;
}""")
# Low nibbles are subtracted from 1024 + 8; high ones sit 4 bits up, so they are divided by 16.
_INT4 = Constant("""{
 .reg .b32 lo, hi, t, c, s, d;
 mov.b32 c, 0x64086408; mov.b32 s, 0x2c002c00; mov.b32 d, 0xd480d480;
 prmt.b32 lo, $8, $9, 0x5410;
 prmt.b32 hi, $8, $9, 0x7632;
 lop3.b32 t, lo, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, t, c;
 lop3.b32 t, lo, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 $1, t, s, d;
 shr.u32 lo, lo, 8;
 lop3.b32 t, lo, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $2, t, c;
 lop3.b32 t, lo, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 $3, t, s, d;
 lop3.b32 t, hi, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $4, t, c;
 lop3.b32 t, hi, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 $5, t, s, d;
 shr.u32 hi, hi, 8;
 lop3.b32 t, hi, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $6, t, c;
 lop3.b32 t, hi, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 $7, t, s, d;
}""")

# As stored: 1024 + n for low nibbles, 1024 + 16 n for high ones.
_INT4_BIASED = Constant("""{
 .reg .b32 lo, hi;
 prmt.b32 lo, $8, $9, 0x5410;
 prmt.b32 hi, $8, $9, 0x7632;
 lop3.b32 $0, lo, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 $1, lo, 0x00f000f0, 0x64006400, 0xea;
 shr.u32 lo, lo, 8;
 lop3.b32 $2, lo, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 $3, lo, 0x00f000f0, 0x64006400, 0xea;
 lop3.b32 $4, hi, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 $5, hi, 0x00f000f0, 0x64006400, 0xea;
 shr.u32 hi, hi, 8;
 lop3.b32 $6, hi, 0x000f000f, 0x64006400, 0xea;
 lop3.b32 $7, hi, 0x00f000f0, 0x64006400, 0xea;
}""")


@triton.jit
def _fp8_number(word, SHIFT: tl.constexpr):
    byte = (word >> SHIFT) & 255
    bits = ((byte & 0x7F) << 7).to(tl.int16)
    size = bits.to(tl.float16, bitcast=True) * 256.0
    return tl.where(byte < 128, size, -size)


@triton.jit
def unpack4(words, CODE: tl.constexpr, OLD: tl.constexpr):
    """int32 words of four 8-bit codes -> four float16 tensors of the same shape."""
    if INTERPRETED:
        if CODE == INT8:
            r0 = ((words << 24) >> 24).to(tl.float16)
            r1 = ((words << 16) >> 24).to(tl.float16)
            r2 = ((words << 8) >> 24).to(tl.float16)
            r3 = (words >> 24).to(tl.float16)
        else:
            r0 = _fp8_number(words, 0)
            r1 = _fp8_number(words, 8)
            r2 = _fp8_number(words, 16)
            r3 = _fp8_number(words, 24)
    else:
        asm: tl.constexpr = INT8_ASM if CODE == INT8 else (_FP8_SM80 if OLD else FP8_ASM)
        r0, r1, r2, r3 = tl.inline_asm_elementwise(
            asm,
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return r0, r1, r2, r3


@triton.jit
def _nibble(words, SHIFT: tl.constexpr, BIASED: tl.constexpr):
    n = (words >> SHIFT) & 15
    n = 1024 + n * (16 if SHIFT % 8 == 4 else 1) if BIASED else n - 8
    return n.to(tl.float16)


@triton.jit
def unpack8(words, BIASED: tl.constexpr):
    """int32 words of eight 4-bit codes, stored as n = code + 8 -> eight float16 tensors.

    BIASED: 1024 + n for even ones and 1024 + 16 n for odd ones, which takes 12 instructions for
    sixteen codes where the codes themselves take 20.
    """
    if INTERPRETED:
        r0, r1 = _nibble(words, 0, BIASED), _nibble(words, 4, BIASED)
        r2, r3 = _nibble(words, 8, BIASED), _nibble(words, 12, BIASED)
        r4, r5 = _nibble(words, 16, BIASED), _nibble(words, 20, BIASED)
        r6, r7 = _nibble(words, 24, BIASED), _nibble(words, 28, BIASED)
    else:
        asm: tl.constexpr = _INT4_BIASED if BIASED else _INT4
        r0, r1, r2, r3, r4, r5, r6, r7 = tl.inline_asm_elementwise(
            asm,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    return r0, r1, r2, r3, r4, r5, r6, r7


@triton.jit
def log2_fast(x):
    """log2 by the special function unit: off by 2^-22 of the result at most, and only a scale of
    probabilities that are normalized again depends on it.
    """
    if INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def load_plane(plane, page_at, key_slot, pair_at, shown, PAIRS: tl.constexpr):
    """Scales or zeros of a tile's tokens as float32.

    PAIRS: 16-bit planes are read two tokens a word, since the asynchronous copy moves at least four
    bytes; what lies outside the mask is then read too, and the caller selects.
    """
    if PAIRS:
        word = tl.load(plane.to(tl.pointer_type(tl.int32)) + pair_at)
        low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return tl.reshape(tl.join(low, high), [2 * word.shape[0]]).to(tl.float32)
    else:
        return tl.load(plane + page_at + key_slot, shown, 0.0).to(tl.float32)
