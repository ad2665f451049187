"""What the Hopper decode kernel multiplies: codes from shared memory to operands of wgmma.

A tile has 64 keys. The layouts are chosen such that what a thread loads and unpacks is what the
product wants of it: registers are renamed, never moved. Three ways in:

- **Bytes** (K of int8 and int4): codes are int8 operands as they lie, or two masks from it; the
  query is two int8 numbers, 128 high + low, and the product exact in int32.
- **Units** (K of fp8): a unit is four codes, a 32-bit word; its code r is channel 4 u + r, in
  float16.
- **Units of V**, turned over: a unit is four codes, of 4-bit codes half a word; the two keys of a
  register pair are neighbours.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.triton import words as triton_words
from quantpage.ops.triton.common import FP8, INT4, INT8, Constant

# Bytes of two codes each -> the even codes and the odd ones, as stored: 8 too large.
_NIBBLES = Constant("and.b32 $0, $2, 0x0f0f0f0f; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0f0f0f0f;")

# Halves a.i of two units in one register become the pair (a.r, b.r) in each of four.
INT4_UNITS = Constant("""{
 .reg .b32 x, t, c, s, d;
 mov.b32 c, 0x64086408; mov.b32 s, 0x2c002c00; mov.b32 d, 0xd480d480;
 lop3.b32 t, $4, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $0, t, c;
 lop3.b32 t, $4, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 $1, t, s, d;
 shr.u32 x, $4, 8;
 lop3.b32 t, x, 0x000f000f, 0x64006400, 0xea; sub.f16x2 $2, t, c;
 lop3.b32 t, x, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 $3, t, s, d;
}""")
_INT8_UNITS = Constant(triton_words.INT8_ASM.value)
_FP8_UNITS = Constant(triton_words.FP8_ASM.value)


@gluon.jit
def unpack(units, CODE: gl.constexpr):
    """Units of four codes -> four float16 tensors of the same shape."""
    if CODE == INT4:
        r0, r1, r2, r3 = gl.inline_asm_elementwise(
            INT4_UNITS, "=r,=r,=r,=r,r", [units], dtype=(gl.float16,) * 4, is_pure=True, pack=2
        )
    else:
        r0, r1, r2, r3 = gl.inline_asm_elementwise(
            _INT8_UNITS if CODE == INT8 else _FP8_UNITS, "=r,=r,=r,=r,r,r", [units],
            dtype=(gl.float16,) * 4, is_pure=True, pack=2,
        )  # fmt: skip
    return r0, r1, r2, r3


@gluon.constexpr_function
def copy_layout(units, unit, warps=4):
    """In which warps ask for a tile's units: sixteen bytes a thread."""
    each = 128 // unit.primitive_bitwidth
    lanes = min(32, units // each)
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def shared_layout(units, unit):
    """In which a tile's units lie: chunks of sixteen bytes swizzled over rows of 128."""
    each = 128 // unit.primitive_bitwidth
    chunks = units // each
    return gl.SwizzledSharedLayout(each, max(1, 8 // chunks), min(8, chunks), [1, 0])


@gluon.constexpr_function
def key_layout(tile, units):
    """Of a tile's units as loaded: a thread has eight neighbouring units of two rows, 16 bytes at
    a time.
    """
    registers = [[0, 1], [0, 2], [0, 4]] + [[0, 32 << i] for i in range(units // 32 - 1)]
    registers += [[8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [tile, units])


@gluon.constexpr_function
def byte_layout(tile, block, row):
    """Of a tile's key bytes as loaded, 16 at a time: of each block of a row's bytes, which are 128
    channels, a thread has a quarter.
    """
    steps = [1, 2, 4, 8] + [16] * (block == 128) + [block] * (row > block)
    registers = [[0, step] for step in steps] + [[8, 0]]
    lanes = [[0, block // 4], [0, block // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [tile, row])


@gluon.constexpr_function
def value_layout(tile, units):
    """A thread has one unit (two at 64) of a quarter of the keys, two neighbours a pair."""
    registers = [[1, 0], [8, 0], [16, 0], [32, 0]] + [[0, 32]] * (units == 64)
    lanes = [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 8], [0, 16]], [], [tile, units])


@gluon.jit
def key_operand(
    k0, k1, k2, k3, TILE: gl.constexpr, UNITS: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """K [keys, channels], channels in the order that query_operand gives the queries."""
    H: gl.constexpr = UNITS // 32
    k = gl.join(gl.join(k0, k1), gl.join(k2, k3))
    k = gl.reshape(k, [TILE, H, 4, 2, 2, 2, 2, 2])
    k = gl.reshape(gl.permute(k, (0, 7, 6, 1, 3, 4, 2, 5)), [TILE, UNITS * 4])
    return gl.convert_layout(k, layout, assert_trivial=True)


@gluon.jit
def nibbles(codes):
    """Bytes of two 4-bit codes -> the even channels' and the odd ones', 8 too large."""
    return gl.inline_asm_elementwise(
        _NIBBLES, "=r,=r,r", [codes], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
    )


@gluon.jit
def byte_operand(k, CODE: gl.constexpr, TILE: gl.constexpr, BYTES: gl.constexpr,
                  layout: gl.constexpr):  # fmt: skip
    """K [keys, channels] as int8 from its bytes, channels in the order of query_bytes."""
    H: gl.constexpr = BYTES // (128 if CODE == INT8 else 64)
    if CODE == INT8:
        k = gl.permute(gl.reshape(k, [TILE, H, 4, 2, 2, 2, 4]), (0, 1, 3, 4, 5, 2, 6))
        k = gl.reshape(k, [TILE, BYTES])
    else:
        even, odd = nibbles(k)
        k = gl.reshape(gl.join(even, odd), [TILE, H, 4, 2, 2, 4, 2])
        k = gl.reshape(gl.permute(k, (0, 1, 3, 4, 6, 2, 5)), [TILE, BYTES * 2])
    return gl.convert_layout(k, layout, assert_trivial=True)


@gluon.jit
def query_bytes(q, CODE: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Queries [rows, channels] in the order in which threads hold K's bytes."""
    H: gl.constexpr = WIDTH // 128
    if CODE == INT8:
        q = gl.permute(gl.reshape(q, [ROWS, H, 4, 2, 2, 2, 4]), (0, 1, 3, 4, 5, 2, 6))
    else:
        q = gl.permute(gl.reshape(q, [ROWS, H, 4, 2, 2, 4, 2]), (0, 1, 3, 4, 6, 2, 5))
    return gl.reshape(q, [ROWS, WIDTH])


@gluon.jit
def fixed_queries(q, size, finite):
    """Queries as integers of 15 bits of each row's largest, and the row's unit, NaN where a query
    is not finite; size: absolute values, 0 for those.
    """
    peak = gl.maximum(gl.max(size, 1), 1e-30)
    # Added and taken off again, the number rounds to the nearest even integer.
    fixed = (q * (16256.0 / peak)[:, None] + 12582912.0) - 12582912.0
    wrong = gl.max((~finite).to(gl.int32), 1)
    unit = gl.where(wrong > 0, float("nan"), peak / 16256.0)
    return gl.where(finite, fixed, 0.0).to(gl.int32), unit


@gluon.jit
def whole_score(s, TILE: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """128 times the high bytes' product plus the low ones': exact in int32 up to head_dim 256."""
    high, low = gl.split(gl.permute(gl.reshape(s, [TILE, 2, ROWS]), (0, 2, 1)))
    return gl.convert_layout(high * 128 + low, layout, assert_trivial=True)


@gluon.jit
def halved(x, ROWS: gl.constexpr):
    """[64 keys, rows] with the two keys of a thread added: half the registers of a running sum."""
    return gl.sum(gl.reshape(x, [4, 2, 8, ROWS]), 1)


@gluon.jit
def query_operand(q, ROWS: gl.constexpr, UNITS: gl.constexpr):
    """Queries [rows, channels] with the channels of a part together, units as threads hold K's."""
    H: gl.constexpr = UNITS // 32
    q = gl.permute(gl.reshape(q, [ROWS, H, 4, 2, 2, 2, 4]), (0, 6, 1, 3, 4, 2, 5))
    return gl.reshape(q, [ROWS, UNITS * 4])


@gluon.jit
def value_operand(
    v0, v1, v2, v3, TILE: gl.constexpr, UNITS: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """V turned over [channels, keys], channels in the order that in_order undoes."""
    H: gl.constexpr = UNITS // 32
    v = gl.join(gl.join(v0, v1), gl.join(v2, v3))
    v = gl.permute(gl.reshape(v, [TILE, H, 4, 8, 2, 2]), (1, 5, 2, 4, 3, 0))
    return gl.convert_layout(gl.reshape(v, [UNITS * 4, TILE]), layout, assert_trivial=True)


@gluon.jit
def in_order(o, UNITS: gl.constexpr, ROWS: gl.constexpr):
    """[channels as value_operand has them, rows] -> [rows, channels]."""
    H: gl.constexpr = UNITS // 32
    o = gl.permute(gl.reshape(o, [H, 2, 4, 2, 8, ROWS]), (5, 0, 2, 4, 1, 3))
    return gl.reshape(o, [ROWS, UNITS * 4])


@gluon.jit
def store_queries(
    q_smem, asked, ROWS: gl.constexpr, WIDTH: gl.constexpr, CODE: gl.constexpr,
    UNITS: gl.constexpr, rows_layout: gl.constexpr,
):  # fmt: skip
    """Queries into shared memory, as the second operand: two int8 numbers each beside integer
    codes, float16 beside others.

    Returns what all scores are divided by, what a row's are multiplied by, and the sum of a row's
    as integers, of 4-bit codes; without bytes the last two are not read.
    """
    size = gl.abs(asked)
    finite = size < float("inf")
    size = gl.where(finite, size, 0.0)
    if CODE != FP8:
        fixed, q_unit = fixed_queries(asked, size, finite)
        q_bytes = query_bytes(fixed, CODE, ROWS, WIDTH)
        q_high = (q_bytes + 64) >> 7
        q_smem.slice(0, ROWS).store(q_high.to(gl.int8))
        q_smem.slice(ROWS, ROWS).store((q_bytes - (q_high << 7)).to(gl.int8))
        q_unit = gl.convert_layout(q_unit, rows_layout)
        q_fixed = q_unit
        if CODE == INT4:
            q_fixed = gl.convert_layout(gl.sum(fixed, 1), rows_layout)
        unit = 1.0
    else:
        peak = gl.max(gl.max(size, 1), 0)
        unit = gl.where(peak > 1e-30, 16384.0 / gl.maximum(peak, 1e-30), 1.0)
        # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
        asked = gl.where(finite, asked * unit, float("nan"))
        q_smem.store(query_operand(asked.to(gl.float16), ROWS, UNITS))
        q_unit = unit
        q_fixed = unit
    return unit, q_unit, q_fixed
