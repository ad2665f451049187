"""The Hadamard rotation of 32 channels as products of the tensor cores, in a thread's own layout.

A warp holds eight rows; lane 4 g + t has channels 8 t .. 8 t + 7 of row g of every piece of 32
channels. That is how operands and results of mma.sync lie when its inner index is taken to be t
and the low bits of a channel's place among its eight: nothing moves between lanes, and the stages
across lanes, which cost a shuffle each, become part of a product with a matrix of +1 and -1.

Factors of a product must be of 16 bits, or of 19 (tf32). Values come so from the projection. What
is rotated by position is float32: x = high + low, 11 bits each, and both are multiplied. Sums are
float32.

Inline PTX depends on the layout, which is the compiler's choice: ``layout_holds`` reads it.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import re

import triton
import triton.language as tl

from quantpage.ops.triton.common import INTERPRETED, Constant

_LAYOUT = (
    r"sizePerThread = \[1, 8\], threadsPerWarp = \[8, 4\], warpsPerCTA = \[\d+, 1\], "
    r"order = \[1, 0\]"
)


def _split_products() -> str:
    """Inputs: float32 of two pieces, sixteen rows of a product, and the signs; outputs: both."""
    names = [f"{kind}{piece}{e}" for kind in "hl" for piece in "ab" for e in range(8)]
    sums = [f"s{c}{o}{r}" for c in range(2) for o in range(2) for r in range(4)]
    lines = [f".reg .b32 {', '.join(names + sums)}, none;", "mov.b32 none, 0;"]
    for p, piece in enumerate("ab"):
        for e in range(8):
            given = f"${16 + 8 * p + e}"
            lines.append(f"and.b32 h{piece}{e}, {given}, 0xffffe000;")
            lines.append(f"sub.f32 l{piece}{e}, {given}, h{piece}{e};")
            # An infinity has no rest: NaN becomes 2^118, which no true rest reaches.
            lines.append(f"@GUARD min.f32 l{piece}{e}, l{piece}{e}, 0f7A800000;")
    for c in range(2):
        for o in range(2):
            into = [f"s{c}{o}{r}" for r in range(4)]
            before = ["none"] * 4
            for kind in "lh":
                for i in range(2):
                    e = 4 * c + 2 * i
                    rows = [f"{kind}a{e}", f"{kind}b{e}", f"{kind}a{e + 1}", f"{kind}b{e + 1}"]
                    signs = "$34, $35" if i & o else "$32, $33"
                    lines.append(
                        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                        f"{{{', '.join(into)}}}, {{{', '.join(rows)}}}, {{{signs}}}, "
                        f"{{{', '.join(before)}}};"
                    )
                    before = into
    for o in range(2):
        for r in range(4):
            e = 8 * (r // 2) + 2 * o + r % 2
            lines.append(f"add.f32 ${e}, s0{o}{r}, s1{o}{r};")
            lines.append(f"sub.f32 ${e + 4}, s0{o}{r}, s1{o}{r};")
    return "{\n " + "\n ".join(lines) + "\n}"


def _products(dtype: str) -> str:
    """Inputs: 16-bit channels of a piece, and the signs, in pairs; outputs: float32.

    The four registers as they were loaded are an operand: bit 1 of a channel's place is the row.
    """
    lines = [".reg .b32 s00, s01, s02, s03, s10, s11, s12, s13, none;", "mov.b32 none, 0;"]
    for c in range(2):
        into = ", ".join(f"s{c}{r}" for r in range(4))
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{{into}}}, "
            f"{{$8, $9, $10, $11}}, {{$12, ${12 + c}}}, {{none, none, none, none}};"
        )
    for c in range(2):
        for j in range(2):
            lines.append(f"add.f32 ${4 * c + j}, s{c}{j}, s{c}{2 + j};")
            lines.append(f"sub.f32 ${4 * c + 2 + j}, s{c}{j}, s{c}{2 + j};")
    return "{\n " + "\n ".join(lines) + "\n}"


def _turns(dtype: str) -> str:
    """Inputs: halves x, y of sixteen heads of a token in four pieces (x, y of eight, x, y of the
    other eight), and cos + sin, cos - sin with signs, each as high and low: 16 bits, in pairs.
    Outputs: x (cos + sin) + y (cos - sin) and x (cos - sin) - y (cos + sin), rotated, of both.
    """
    x, y, p, m = 32, 36, 48, 56
    names = [f"s{r}{o}{i}" for r in range(4) for o in range(2) for i in range(4)]
    names += [f"n{r}{low}" for r in range(4) for low in range(2)]
    lines = [f".reg .b32 {', '.join(names)}, none, a, b, c, d;", "mov.b32 none, 0;"]
    for r in range(4):
        for low in range(2):
            lines.append(f"xor.b32 n{r}{low}, ${p + 4 * low + r}, 0x80008000;")
        rows = ", ".join(f"${at + r}" for at in (x, x + 8, y, y + 8))
        for o in range(2):
            into = ", ".join(f"s{r}{o}{i}" for i in range(4))
            before = "none, none, none, none"
            for low in (1, 0):
                plus, minus = f"${p + 4 * low + r}", f"${m + 4 * low + r}"
                factors = f"{minus}, n{r}{low}" if o else f"{plus}, {minus}"
                lines.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{{into}}}, "
                    f"{{{rows}}}, {{{factors}}}, {{{before}}};"
                )
                before = into
    for o in range(2):
        for i in range(4):
            to = 16 * (i // 2) + 8 * o + i % 2
            lines += [
                f"add.f32 a, s0{o}{i}, s1{o}{i};", f"sub.f32 b, s0{o}{i}, s1{o}{i};",
                f"add.f32 c, s2{o}{i}, s3{o}{i};", f"sub.f32 d, s2{o}{i}, s3{o}{i};",
                f"add.f32 ${to}, a, c;", f"add.f32 ${to + 2}, b, d;",
                f"sub.f32 ${to + 4}, a, c;", f"sub.f32 ${to + 6}, b, d;",
            ]  # fmt: skip
    return "{\n " + "\n ".join(lines) + "\n}"


_GUARDED = Constant(_split_products().replace("@GUARD ", ""))
_PLAIN = Constant(re.sub(r"\n @GUARD .*", "", _split_products()))
_HALF = Constant(_products("f16"))
_BFLOAT = Constant(_products("bf16"))
_HALF_TURN = Constant(_turns("f16"))
_BFLOAT_TURN = Constant(_turns("bf16"))
_OF_TURNS = Constant(",".join(["=r"] * 32 + ["r"] * 32))
_OF_FLOATS = Constant(",".join(["=r"] * 16 + ["r"] * 24))
_OF_PAIRS = Constant(",".join(["=r"] * 8 + ["r"] * 8))


@triton.jit
def widened(x):
    """Float32; two bfloat16 take two instructions, not three."""
    if x.dtype == tl.bfloat16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def signs_of(ROWS: tl.constexpr, dtype: tl.constexpr):
    """The matrix, as each lane needs it: its first four of eight numbers."""
    row = tl.arange(0, ROWS)[:, None] % 8
    channel = tl.arange(0, 32)[None, :]
    both = (channel // 8) & (row >> 1)
    odd = both ^ (both >> 1) ^ (channel & row) ^ (channel >> 1)
    return (1.0 - 2.0 * (odd & 1).to(tl.float32)).to(dtype)


@triton.jit
def hadamard_products(parts, signs, GUARD: tl.constexpr):
    """Pieces [ROWS, 32] in float32 or as they were loaded, rotated each by itself, unscaled.

    GUARD: an infinity stays one, as in sums.
    """
    turned = ()
    if parts[0].dtype == tl.float32:
        for i in tl.static_range(len(parts) // 2):
            one, two = tl.inline_asm_elementwise(
                _GUARDED if GUARD else _PLAIN, _OF_FLOATS, [parts[2 * i], parts[2 * i + 1], signs],
                dtype=(tl.float32, tl.float32), is_pure=True, pack=8,
            )  # fmt: skip
            turned = turned + (one, two)
    else:
        for i in tl.static_range(len(parts)):
            done = tl.inline_asm_elementwise(
                _HALF if parts[0].dtype == tl.float16 else _BFLOAT, _OF_PAIRS, [parts[i], signs],
                dtype=tl.float32, is_pure=True, pack=8,
            )  # fmt: skip
            turned = turned + (done,)
    return turned


@triton.jit
def _halves(x, dtype: tl.constexpr):
    """High and low 16-bit halves of float32."""
    # What a mask leaves is exact in 16 bits: one conversion packs two.
    KEPT: tl.constexpr = -0x2000 if dtype == tl.float16 else -0x10000
    high = (x.to(tl.int32, bitcast=True) & KEPT).to(tl.float32, bitcast=True)
    return high.to(dtype), (x - high).to(dtype)


@triton.jit
def turn_factors(
    cos, sin, where, ROWS: tl.constexpr, gain: tl.constexpr, HEAD_DIM: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """The angles of a token as factors of ``turned_by_products``, high and low halves."""
    row = tl.arange(0, ROWS)[:, None] % 8
    lane = tl.arange(0, 32)[None, :]
    both = (lane // 8) & (row >> 1)
    odd = (both ^ (both >> 1) ^ (lane & row)) & 1
    sign = gain - (2.0 * gain) * odd.to(tl.float32)
    factors = ()
    for i in tl.static_range(HEAD_DIM // 64):
        at = where[:, None] + i * 32 + lane
        c = tl.load(cos + at).to(tl.float32)
        s = tl.load(sin + at).to(tl.float32)
        factors = factors + _halves((c + s) * sign, dtype) + _halves((c - s) * sign, dtype)
    return factors


@triton.jit
def turned_by_products(one, two, factors):
    """Heads 0 to 7 and 8 to 15 of a token, as loaded: rotated by position and, but for the stages
    between pieces of a half, by the Hadamard matrix. A tuple of the pieces of both.
    """
    HALF: tl.constexpr = len(one) // 2
    a = ()
    b = ()
    c = ()
    d = ()
    for i in tl.static_range(HALF):
        w, x, y, z = tl.inline_asm_elementwise(
            _HALF_TURN if one[0].dtype == tl.float16 else _BFLOAT_TURN, _OF_TURNS,
            [one[i], one[i + HALF], two[i], two[i + HALF], factors[4 * i], factors[4 * i + 1],
             factors[4 * i + 2], factors[4 * i + 3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=8,
        )  # fmt: skip
        a = a + (w,)
        b = b + (x,)
        c = c + (y,)
        d = d + (z,)
    return a + b + c + d


def layout_holds(ttgir: str) -> bool:
    """Whether all that takes a thread's eight channels has the layout it was written for."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>", ttgir, re.MULTILINE))
    used = set(re.findall(r"elementwise_inline_asm.*packed_element = 8 .*->.*?, (#\w+)>", ttgir))
    return bool(used) and all(re.search(_LAYOUT, layouts.get(name, "")) for name in used)


_seen: dict[str, bool] = {}


def as_written(compiled) -> bool:
    """``layout_holds`` of a compiled kernel, remembered."""
    if not hasattr(compiled, "asm"):
        # Still being compiled, and not launched (ops/triton/ahead): the launch that is will see.
        return True
    if compiled.hash not in _seen:
        # A cache of binaries alone (TRITON_STORE_BINARY_ONLY) has no text to look into.
        _seen[compiled.hash] = layout_holds(compiled.asm.get("ttgir", ""))
    return _seen[compiled.hash]
