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
from quantpage.ops.triton.common import INT3, INT6, INTERPRETED, Constant

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


# Decode multiplies codes from registers: rows are read in pairs of bytes, which lie in a register
# as its operands do, two keys or two pairs in one. Fields of a pair's bytes are parts: part
# 4 r + 2 j + n is byte j and field i = r + 2 n of the high plane, so that the parts of n = 1 are
# four bits above those of n = 0 wherever they are cut from.


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
        high = _repeated(high, 2, AXIS)
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
