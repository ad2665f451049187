"""What the Hopper kernel of latent rows multiplies: codes from shared memory to operands.

As decode/gluon_operands, whose three ways in are these, PART channels at a time: integer codes are
keys as bytes against queries of two int8 numbers, codes of fp8 keys in float16, and all of them
values in float16, turned over. Registers are renamed, never moved.

With eight warps the first product gives each warpgroup half of the query rows, the second half of
the channels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_operands import unpack
from quantpage.ops.attend.decode.gluon_share import shown_keys
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.triton.common import FP8, Constant

# The four codes of a word, neighbours side by side.
_PAIRS = Constant("""{
 .reg .b16 a, b; .reg .b32 x, y;
 mov.b32 {a, b}, $4;
 cvt.rn.f16x2.e4m3x2 x, a; cvt.rn.f16x2.e4m3x2 y, b;
 mov.b32 {$0, $1}, x; mov.b32 {$2, $3}, y;
}""")

# By one thread: a tile's codes, or a line of its scales.
_INTO_L2 = Constant("""{
 .reg .pred p; .reg .b32 t;
 mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.b32 $0, 0;
 @p cp.async.bulk.prefetch.L2.global [$1], $2;
}""")
_LINE_INTO_L2 = Constant("""{
 .reg .pred p; .reg .b32 t;
 mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.b32 $0, 0;
 @p prefetch.global.L2 [$1];
}""")

PART = Constant(128)
"""Channels that threads hold at once of a tile."""


@gluon.constexpr_function
def key_layout(units, per_quarter, warps):
    """A thread has a quarter of two rows' units, 16 bytes at a time; both warpgroups have all.

    per_quarter: units of a quarter.
    """
    registers = []
    step = 1
    while step < per_quarter:
        registers.append([0, step])
        step *= 2
    registers.append([8, 0])
    lanes = [[0, per_quarter], [0, 2 * per_quarter], [1, 0], [2, 0], [4, 0]]
    groups = [[16, 0], [32, 0]] + [[0, 0]] * (warps == 8)
    return gl.DistributedLinearLayout(registers, lanes, groups, [], [64, units])


@gluon.constexpr_function
def value_layout(keys, units):
    """Of a part's words, eight a warp: a thread has one of a quarter of the keys, two neighbours a
    pair.
    """
    registers = [[1, 0]] + [[8 << i, 0] for i in range((keys // 8).bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]]
    groups = [[0, 8 << i] for i in range((units // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, groups, [], [keys, units])


@gluon.jit
def key_part(smem, CODE: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """K [64 keys, channels] from a part's bytes; of fp8 from words, in the order of _query_part."""
    if CODE == FP8:
        UNITS: gl.constexpr = smem.shape[1]
        codes = smem.load(key_layout(UNITS, UNITS // 4, WARPS))
        k0, k1, k2, k3 = gl.inline_asm_elementwise(
            _PAIRS, "=h,=h,=h,=h,r", [codes], dtype=(gl.float16,) * 4, is_pure=True, pack=1
        )
        k = gl.join(gl.join(k0, k2), gl.join(k1, k3))
        k = gl.permute(gl.reshape(k, [64, 4, UNITS // 4, 2, 2]), (0, 2, 3, 1, 4))
        k = gl.convert_layout(gl.reshape(k, [64, UNITS * 4]), layout, assert_trivial=True)
    else:
        k = smem.load(layout)
    return k


@gluon.jit
def _query_part(q, CODE: gl.constexpr):
    """Queries [rows, channels of a part] in the order in which threads hold K."""
    ROWS: gl.constexpr = q.shape[0]
    WIDTH: gl.constexpr = q.shape[1]
    if CODE == FP8:
        q = gl.permute(gl.reshape(q, [ROWS, 4, WIDTH // 16, 2, 2]), (0, 2, 3, 1, 4))
        q = gl.reshape(q, [ROWS, WIDTH])
    return q


@gluon.jit
def codes_into_l2(
    codes, page_stride, page, key_start, PAGE: gl.constexpr, TILE: gl.constexpr,
    UNITS: gl.constexpr,
):  # fmt: skip
    """Have a tile's codes fetched from memory before there is a place for them; nobody waits."""
    at = codes + page.to(gl.int64) * page_stride + key_start % PAGE * UNITS
    gl.inline_asm_elementwise(
        _INTO_L2, "=r,l,r", [at.to(gl.int64), TILE * UNITS * 4], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def scales_into_l2(pages, page, key_start, PAGE: gl.constexpr, TILE: gl.constexpr):
    """The same of its scales, which are asked for a tile before they are needed: memory that is
    busy takes longer.
    """
    if PAGE >= TILE:
        slot = key_start % PAGE
        for i in gl.static_range(2):
            at = pages.scale + page.to(gl.int64) * pages.scale_step + slot
            if i == 1:
                at = pages.rotary_scale + page.to(gl.int64) * pages.rotary_scale_step + slot
            gl.inline_asm_elementwise(
                _LINE_INTO_L2, "=r,l", [at.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
            )


@gluon.jit
def hide_codes(tile, key_start, seen, WINDOW: gl.constexpr):
    """Codes of keys that no query sees become 0 in shared memory: slots may hold NaN of fp8. Who
    still makes scores of them hides those too.
    """
    TILE: gl.constexpr = tile.shape[0]
    UNITS: gl.constexpr = 8 * gl.num_warps()
    units: gl.constexpr = value_layout(TILE, UNITS)
    key = key_start + gl.arange(0, TILE, gl.SliceLayout(1, units))
    shown = shown_keys(
        key, seen.a_low, seen.a_high, seen.b_low, seen.b_high, seen.context - seen.q_len,
        seen.window, seen.sink_tokens, WINDOW, ALL_KEYS,
    )  # fmt: skip
    for i in gl.static_range(tile.shape[1] // UNITS):
        part = tile.slice(i * UNITS, UNITS, dim=1)
        part.store(gl.where(shown[:, None], part.load(units), 0))


@gluon.jit
def value_part(
    tile, FIRST: gl.constexpr, KEYS: gl.constexpr, NTH: gl.constexpr, CODE: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """V turned over [channels, KEYS] from a tile's words, keys from FIRST on, channels of part NTH,
    eight words a warp, in the order that ``ordered`` undoes.
    """
    UNITS: gl.constexpr = 8 * gl.num_warps()
    words = tile.slice(FIRST, KEYS).slice(NTH * UNITS, UNITS, dim=1).load(value_layout(KEYS, UNITS))
    v0, v1, v2, v3 = unpack(words, CODE)
    v = gl.join(gl.join(v0, v1), gl.join(v2, v3))
    v = gl.permute(gl.reshape(v, [KEYS, UNITS // 8, 8, 2, 2]), (4, 1, 3, 2, 0))
    return gl.convert_layout(gl.reshape(v, [4 * UNITS, KEYS]), layout, assert_trivial=True)


@gluon.constexpr_function
def output_layout(rows, units):
    """Of a part of the output as ``ordered`` gives it: a thread's four neighbouring channels come
    first, which are stored at once, by eight threads a row side by side.
    """
    registers = [[0, 1], [0, 2], [1, 0]] + [
        [8 << i, 0] for i in range((rows // 8).bit_length() - 1)
    ]
    lanes = [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]]
    groups = [[0, 32 << i] for i in range((units // 8).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, groups, [], [rows, 4 * units])


@gluon.jit
def ordered(o, WARPS: gl.constexpr):
    """[channels as value_part has them, rows] -> [rows, channels]."""
    ROWS: gl.constexpr = o.shape[1]
    o = gl.permute(gl.reshape(o, [2, WARPS, 2, 8, ROWS]), (4, 1, 3, 0, 2))
    o = gl.reshape(o, [ROWS, 32 * WARPS])
    return gl.convert_layout(o, output_layout(ROWS, 8 * WARPS), assert_trivial=True)


@gluon.constexpr_function
def query_layout(width, warps):
    """Of queries as they are loaded, half a row of threads to each of two rows."""
    return gl.BlockedLayout([1, width // 16], [2, 16], [warps, 1], [1, 0])


@gluon.jit
def _asked(at, real, WIDTH: gl.constexpr, WARPS: gl.constexpr):
    """WIDTH channels of queries as they lie."""
    layout: gl.constexpr = query_layout(WIDTH, WARPS)
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    at = gl.convert_layout(at, rows)
    mask = gl.convert_layout(real, rows)[:, None]
    return gl.load(at[:, None] + channel[None, :], mask=mask, other=0.0)


@gluon.jit
def _size(x):
    """Absolute values, infinite where they are not finite."""
    size = gl.abs(x.to(gl.float32))
    return gl.where(size < float("inf"), size, float("inf"))


@gluon.jit
def _store_part(smem, x, unit, CODE: gl.constexpr, GROUPS: gl.constexpr):
    """A part of queries as the second operand; of rows that are not finite anything."""
    ROWS: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    unit = gl.convert_layout(unit, gl.SliceLayout(1, x.type.layout))[:, None]
    x = x.to(gl.float32) * unit
    if CODE == FP8:
        smem.store(_query_part(x.to(gl.float16), CODE))
    else:
        # Added to 1.5 * 2^23 the number rounds to the nearest even integer, in the sum's low bits.
        fixed = (x + 12582912.0).to(gl.int32, bitcast=True) - 0x4B400000
        high = (fixed + 64) >> 7
        both = gl.join(high, fixed - (high << 7)).to(gl.int8)
        both = gl.reshape(both, [GROUPS, ROWS // GROUPS, WIDTH, 2])
        smem.store(gl.reshape(gl.permute(both, (0, 3, 1, 2)), [2 * ROWS, WIDTH]))


@gluon.jit
def ask_queries(
    at, real, ROW_DIM: gl.constexpr, ROTARY_DIM: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Queries as they lie, four parts and their rotary channels. at: pointers of rows."""
    gl.static_assert(ROW_DIM == 4 * PART)
    return (
        _asked(at, real, PART, WARPS),
        _asked(at + PART, real, PART, WARPS),
        _asked(at + 2 * PART, real, PART, WARPS),
        _asked(at + 3 * PART, real, PART, WARPS),
        _asked(at + ROW_DIM, real, ROTARY_DIM, WARPS),
    )


@gluon.jit
def store_queries(
    row_smem, rotary_smem, asked0, asked1, asked2, asked3, turned, rows: gl.constexpr,
    CODE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Queries into shared memory as the second operand of scores: two int8 numbers each beside
    integer codes, float16 beside others.

    Returns what a row's scores are multiplied by, in the layout ``rows``; NaN where a query is not
    finite: an infinite one would weigh keys by 0 or 1.
    """
    GROUPS: gl.constexpr = WARPS // 4
    size = gl.maximum(gl.maximum(_size(asked0), _size(asked1)), _size(asked2))
    high = gl.convert_layout(gl.max(gl.maximum(size, _size(asked3)), 1), rows)
    high = gl.maximum(high, gl.convert_layout(gl.max(_size(turned), 1), rows))
    finite = high < float("inf")
    high = gl.maximum(gl.where(finite, high, 0.0), 1e-30)
    if CODE == FP8:
        # Of a power of two: it rounds nothing, and brings the largest to float16's upper end.
        power = (high.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
        left = power / 16384.0
    else:
        # Of 15 bits.
        left = high / 16256.0
    unit = 1.0 / left
    _store_part(row_smem.slice(0, PART, dim=1), asked0, unit, CODE, GROUPS)
    _store_part(row_smem.slice(1 * PART, PART, dim=1), asked1, unit, CODE, GROUPS)
    _store_part(row_smem.slice(2 * PART, PART, dim=1), asked2, unit, CODE, GROUPS)
    _store_part(row_smem.slice(3 * PART, PART, dim=1), asked3, unit, CODE, GROUPS)
    _store_part(rotary_smem, turned, unit, CODE, GROUPS)
    return gl.where(finite, left, float("nan"))


@gluon.jit
def score_of(s, CODE: gl.constexpr, GROUPS: gl.constexpr, layout: gl.constexpr):
    """A product as float32 [64 keys, rows]: 128 times the high bytes' plus the low ones', exact in
    int32 up to 1,024 channels.
    """
    if CODE == FP8:
        made = s
    else:
        ROWS: gl.constexpr = s.shape[1] // 2
        s = gl.permute(gl.reshape(s, [64, GROUPS, 2, ROWS // GROUPS]), (0, 1, 3, 2))
        high, low = gl.split(s)
        s = gl.reshape(high * 128 + low, [64, ROWS])
        made = gl.convert_layout(s, layout, assert_trivial=True).to(gl.float32)
    return made


@gluon.jit
def far_bits(x, GROUPS: gl.constexpr):
    """The largest of a warp's, as bits: positive floats are ordered as integers, and negative ones
    are below them.
    """
    ROWS: gl.constexpr = x.shape[1]
    bits = gl.reshape(x.to(gl.int32, bitcast=True), [4, 16, GROUPS, ROWS // GROUPS])
    bits = gl.reshape(gl.permute(bits, (0, 2, 1, 3)), [4 * GROUPS, 16 * ROWS // GROUPS])
    return gl.max(bits, 1)
