"""Codes in planes as decode multiplies them: rows are read in pairs of bytes.

Pairs lie in a register as an operand of the tensor cores does, two keys or two neighbours in one,
and are copied there as 16-bit numbers are. Fields of their bytes are parts: part 4 r + 2 j + n is
byte j and field i = r + 2 n of the high plane, a quarter of the channels after field i - 1; parts
of n = 1 are four bits above those of n = 0 wherever they are cut from.
"""

import triton
import triton.language as tl

from quantpage.ops.operand import CODE_KINDS
from quantpage.ops.triton.common import INT3, INT6, INTERPRETED
from quantpage.ops.triton.planes import half_range, high_bits


@triton.constexpr_function
def part_of_pairs(part, channels):
    """The channel of a part, less that of part 0 of the same pair."""
    r, j, n = part >> 2, part >> 1 & 1, part & 1
    return (r + 2 * n) * (channels // 4) + j


@triton.jit
def first_of_pair(place, D: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr):
    """The channel of part 0 in each place of a tile of WIDTH pairs; D where a row has no pair."""
    HALVES: tl.constexpr = 4 // high_bits(CODE) // 2
    EACH: tl.constexpr = D // (8 * HALVES)
    half = place // (WIDTH // HALVES)
    at = place % (WIDTH // HALVES)
    return tl.where(at < EACH, 2 * (half * EACH + at), D)


@triton.jit
def half_of(codes, WIDTH: tl.constexpr, never):
    """Half of the low plane in each place of a tile of pairs of int3, for ``load_parts``.

    The compiler takes a change of layout before loads alone, not before numbers that it makes up:
    so they are what a load gives that never happens. never: False, which it does not know.
    """
    place = tl.arange(0, WIDTH)
    half = (place // (WIDTH // 2)).to(tl.int16)
    return tl.load(codes + place, never & (place >= 0), half)


@triton.jit
def load_parts(rows, half, D: tl.constexpr, WIDTH: tl.constexpr, CODE: tl.constexpr,
               BIASED: tl.constexpr, AXIS: tl.constexpr):  # fmt: skip
    """Codes of rows in eight parts, float16 tiles of WIDTH pairs along AXIS.

    rows: pointers in int16 as of ``load_bytes``. BIASED: n = code plus half the range comes as
    1024 + n, and in odd parts of int3 as 1024 + 16 n.
    """
    place = tl.arange(0, WIDTH)
    if CODE == INT6:
        EACH: tl.constexpr = D // 8
        low = _load_pairs(rows, place, place < EACH, EACH < WIDTH, AXIS)
        low_too = _load_pairs(rows + EACH, place, place < EACH, EACH < WIDTH, AXIS)
        high = _load_pairs(rows + 2 * EACH, place, place < EACH, EACH < WIDTH, AXIS)
    else:
        FEW: tl.constexpr = D // 16
        HALF: tl.constexpr = WIDTH // 2
        few = tl.arange(0, HALF)
        at = place // HALF * FEW + place % HALF if FEW < HALF else place
        low = _load_pairs(rows, at, place % HALF < FEW, FEW < HALF, AXIS)
        high = _load_pairs(rows + 2 * FEW, few, few < FEW, FEW < HALF, AXIS)
        high = _two_halves(high, AXIS)
        low_too = tl.broadcast_to(tl.expand_dims(half, 1 - AXIS), low.shape)
    if INTERPRETED:
        return (
            _part(low, low_too, high, 0, CODE, BIASED), _part(low, low_too, high, 1, CODE, BIASED),
            _part(low, low_too, high, 2, CODE, BIASED), _part(low, low_too, high, 3, CODE, BIASED),
            _part(low, low_too, high, 4, CODE, BIASED), _part(low, low_too, high, 5, CODE, BIASED),
            _part(low, low_too, high, 6, CODE, BIASED), _part(low, low_too, high, 7, CODE, BIASED),
        )  # fmt: skip
    else:
        asm: tl.constexpr = parts_asm(CODE, BIASED)
        return tl.inline_asm_elementwise(
            asm, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [low, low_too, high],
            dtype=(tl.float16,) * 8, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def _two_halves(x, AXIS: tl.constexpr):
    """A tile two times along an axis, in whatever layout it is asked for: conversions pass it."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if AXIS == 1:
        both = tl.broadcast_to(x[:, None, :], [ROWS, 2, COLUMNS])
        return tl.reshape(both, [ROWS, 2 * COLUMNS])
    else:
        both = tl.broadcast_to(x[None, :, :], [2, ROWS, COLUMNS])
        return tl.reshape(both, [2 * ROWS, COLUMNS])


@triton.jit
def _load_pairs(rows, at, inside, PADDED: tl.constexpr, AXIS: tl.constexpr):
    at = tl.expand_dims(at, 1 - AXIS)
    if PADDED:
        return tl.load(rows + at, tl.expand_dims(inside, 1 - AXIS), 0)
    else:
        return tl.load(rows + at)


@triton.jit
def _part(low, low_too, high, PART: tl.constexpr, CODE: tl.constexpr, BIASED: tl.constexpr):
    """One part as ``parts_asm`` makes it. low_too: int6: the other half; int3: which half."""
    R: tl.constexpr = PART >> 2
    BYTE: tl.constexpr = 8 * (PART >> 1 & 1)
    N: tl.constexpr = PART & 1
    if CODE == INT6:
        low = low_too if R == 1 else low
        n = low.to(tl.int32) >> (BYTE + 4 * N) & 15
        n |= (high.to(tl.int32) >> (BYTE + 2 * (R + 2 * N)) & 3) << 4
    else:
        n = low.to(tl.int32) >> (BYTE + 2 * (R + 2 * N)) & 3
        n |= (high.to(tl.int32) >> (BYTE + 2 * (R + 2 * N) + low_too.to(tl.int32)) & 1) << 2
    if BIASED:
        return (1024 + n * (16 if CODE == INT3 and N == 1 else 1)).to(tl.float16)
    else:
        return (n - half_range(CODE)).to(tl.float16)


@triton.constexpr_function
def parts_asm(code, biased):
    """``load_parts``' arithmetic: $8 the low plane (int6: its first half, $9 its other one; int3:
    $9 which half), $10 the high plane. Two pairs a register.
    """
    return _PARTS[code, biased]


def _six_bits(biased: bool) -> str:
    # A byte a code first: the select keeps four bits of the low plane, six are clean. 0x6400 | n is
    # the float16 1024 + n.
    lines = [
        ".reg .b32 h0, h1, l, h, x, t, magic, bias, four;",
        "mov.b32 magic, 0x64646464; mov.b32 bias, 0x64206420; mov.b32 four, 0x0f0f0f0f;",
        "and.b32 h0, $10, 0x33333333;",
        "shr.u32 h1, $10, 2; and.b32 h1, h1, 0x33333333;",
    ]
    for r in range(2):
        for n in range(2):
            lines.append(f"shr.u32 l, ${8 + r}, 4;" if n else f"mov.b32 l, ${8 + r};")
            lines.append(f"mov.b32 h, h{r};" if n else f"shl.b32 h, h{r}, 4;")
            lines.append("lop3.b32 x, l, h, four, 0xe4;")
            for j in range(2):
                to = f"${4 * r + 2 * j + n}"
                pick = ("0x4240", "0x4341")[j]
                if biased:
                    lines.append(f"prmt.b32 {to}, x, magic, {pick};")
                else:
                    lines.append(f"prmt.b32 t, x, magic, {pick}; sub.f16x2 {to}, t, bias;")
    return "{\n " + "\n ".join(lines) + "\n}"


def _three_bits(biased: bool) -> str:
    # Four bits a code first, of which three are clean: two of the low plane, one above them.
    lines = [
        ".reg .b32 s, h, h0, l, x, t, two, c, d, k;",
        "mov.b32 two, 0x33333333; mov.b32 c, 0x64046404; mov.b32 k, 0x2c002c00;",
        "mov.b32 d, 0xd440d440;",
        "and.b32 s, $9, 1; shr.u32 h, $10, s; shl.b32 h0, h, 2;",
    ]
    for r in range(2):
        lines.append("shr.u32 l, $8, 2;" if r else "mov.b32 l, $8;")
        lines.append(f"lop3.b32 x, l, {'h' if r else 'h0'}, two, 0xe4;")
        for j in range(2):
            if j:
                lines.append("shr.u32 x, x, 8;")
            for n in range(2):
                to, field = f"${4 * r + 2 * j + n}", ("0x00070007", "0x00700070")[n]
                cut = f"x, {field}, 0x64006400, 0xea;"
                if biased:
                    lines.append(f"lop3.b32 {to}, {cut}")
                else:
                    plain = f"fma.rn.f16x2 {to}, t, k, d;" if n else f"sub.f16x2 {to}, t, c;"
                    lines.append(f"lop3.b32 t, {cut} {plain}")
    return "{\n " + "\n ".join(lines) + "\n}"


_PARTS = {
    (CODE_KINDS[name], biased): made(biased)
    for name, made in (("int6", _six_bits), ("int3", _three_bits))
    for biased in (False, True)
}
