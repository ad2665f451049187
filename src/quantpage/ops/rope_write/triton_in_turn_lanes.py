"""Rows that are rounded in turn where they were turned: in the registers of four lanes.

In steps of the scale, with u a row before anything is rounded and U unit lower triangular,

    wanted_i = u_i + sum_{j > i} e_j (-U_ji)      c_i = clip(rint(wanted_i))      e_i = c_i - u_i

Lane 4 g + t of a warp has channels 8 t .. 8 t + 7 of row g of every piece of 32 channels, as the
products of the Hadamard rotation leave them (triton_products). Of a piece first lane 3 rounds its
eight, one after the other, then lane 2, .. : all lanes do, and one of four keeps what it found.
What a lane's errors say to the others, and a piece's to the pieces before it, are products of
mma.sync: errors lie as its left operand wants them, and sums come where the channels lie. Nothing
moves between lanes, and nothing goes through memory. An error is a high and a low half of 16 bits,
which are rows g and g + 8 of one product.

Between two channels of a lane stand three operations. With z = (wanted - lowest) / (highest -
lowest), its clipping is a multiply-add that saturates, and what an error says is split into what
the code says, which is added when it is known, and what u says, which was taken off before.
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantpage.formats.spec import QuantSpec
from quantpage.ops.rope_write.triton_in_turn_said import own_said, pair_said
from quantpage.ops.triton.codes import largest, lift, smallest
from quantpage.ops.triton.common import Constant

PIECE = Constant(32)
"""Channels of a piece: eight of each of four lanes."""
_ROUND = Constant(12582912.0)


class Lanes(NamedTuple):
    """``KeyMap.feedback`` in steps of the codes, as lanes take it."""

    own: Any
    """float32 [kv_heads, pieces, 4, 4, 8]: -U between a lane's eight channels, in ranges of the
    codes; from channel i to channel j < i is number i (i - 1) / 2 + j, eight of each lane at a
    time."""
    between: Any
    """int32 [kv_heads, pairs, 4, 32, 4]: two float16 each, -U from a piece to itself (from one lane
    to those before it), to the piece before it, .., as operands of mma.sync, four of each lane at a
    time; pairs of piece p begin at p (p + 1) / 2."""
    weight: Any
    """float32 [kv_heads, head_dim]: what a step of error costs."""


def lanes_of(feedback: Tensor, spec: QuantSpec) -> Lanes:
    """feedback: float32 [kv_heads, head_dim, head_dim] of ``KeyMap``, head_dim a multiple of 32."""
    heads, width = feedback.shape[:2]
    pieces, device = width // PIECE.value, feedback.device
    low = spec.code.qmin if spec.zero_point else -spec.code.qmax
    said = -feedback.tril(-1)
    own = torch.zeros(heads, pieces, 4, 32, device=device)
    eights = said.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).diagonal(dim1=1, dim2=3)
    eights = eights.permute(0, 3, 1, 2).unflatten(1, (pieces, 4))
    at_from, at_to = torch.tril_indices(8, 8, -1, device=device)
    own[..., :28] = eights[..., at_from, at_to] / (spec.code.qmax - low)
    own = own.unflatten(3, (4, 8)).transpose(2, 3).contiguous()
    # From: piece, lane, which product, which register, which half. To: piece, row of lanes, tile,
    # and the low bit of the row: a channel's place is 8 row // 2 + 2 tile + row % 2.
    tiles = said.unflatten(2, (pieces, 4, 4, 2)).unflatten(1, (pieces, 4, 2, 2, 2))
    tiles = tiles.permute(0, 1, 6, 7, 9, 2, 8, 3, 4, 5).flatten(3, 5).flatten(4, 6)
    lane = torch.arange(32, device=device)
    later = lane % 4 > lane // 8
    found = []
    for piece in range(pieces):
        found.append(tiles[:, piece, piece] * later[:, None, None])
        found += [tiles[:, piece, piece - back] for back in range(1, piece + 1)]
    pairs = torch.stack(found, 1).half().view(torch.int32).squeeze(-1)
    pairs = pairs.unflatten(3, (4, 4)).transpose(2, 3).contiguous()
    weight = feedback.diagonal(dim1=1, dim2=2).contiguous()
    return Lanes(own, pairs, weight)


@triton.constexpr_function
def _prepared(low: float, high: float) -> str:
    """Inputs: u of eight channels, what they heard, and what they say; outputs: z but for what
    other lanes of the piece say.
    """
    lines = [f".reg .f32 {', '.join(f'n{i}' for i in range(1, 8))}, x;"]
    for j in range(8):
        lines.append(f"add.rn.f32 x, ${8 + j}, ${16 + j};")
        lines.append(f"fma.rn.f32 ${j}, x, {1 / (high - low):.16e}, {-low / (high - low):.16e};")
    for i in range(7, 0, -1):
        lines.append(f"neg.f32 n{i}, ${8 + i};")
        for j in range(i):
            lines.append(f"fma.rn.f32 ${j}, n{i}, ${24 + i * (i - 1) // 2 + j}, ${j};")
    return "{\n " + "\n ".join(lines) + "\n}"


@triton.constexpr_function
def _eight(low: float, high: float, lane: int, first: bool) -> str:
    """Round eight channels of lane ``lane`` of four; the others keep what they have.

    Inputs: ``_prepared``, u, errors kept, what they say, the lane, and but for the ``first`` of a
    piece what other lanes say; outputs: errors.
    """
    base, u, kept, said, owner, heard = 8, 16, 24, 32, 64, 72
    span, by, most = f"{high - low:.1f}", f"{1 / (high - low):.16e}", 12582912.0
    lines = [
        ".reg .pred mine;", f".reg .f32 {', '.join(f'z{j}' for j in range(8))}, t, held, code, x;",
        f"setp.eq.s32 mine, ${owner}, {lane};",
    ]  # fmt: skip
    for j in range(7, -1, -1):
        if first:
            lines.append(f"mov.f32 z{j}, ${base + j};")
        else:
            lines.append(f"fma.rn.f32 z{j}, ${heard + j}, {by}, ${base + j};")
    lines.append("add.sat.f32 t, z7, 0.0;")
    for i in range(7, -1, -1):
        lines.append(f"fma.rn.f32 held, t, {span}, {low + most:.1f};")
        lines.append(f"add.rn.f32 code, held, {-most:.1f};")
        for j in range(i - 1, -1, -1):
            number = f"${said + i * (i - 1) // 2 + j}"
            if j == i - 1:
                lines.append(f"fma.rn.sat.f32 t, code, {number}, z{j};")
            else:
                lines.append(f"fma.rn.f32 z{j}, code, {number}, z{j};")
        lines.append(f"sub.rn.f32 x, code, ${u + i};")
        lines.append(f"selp.f32 ${i}, x, ${kept + i}, mine;")
    return "{\n " + "\n ".join(lines) + "\n}"


@triton.constexpr_function
def _distances(low: float, high: float) -> str:
    """Inputs: eight errors, what they say, what other lanes and pieces say; outputs: how far codes
    are from what was wanted.
    """
    error, said, lanes, pieces = 8, 16, 48, 56
    lines = [".reg .f32 x;"]
    for j in range(8):
        lines.append("mov.f32 x, 0.0;")
        for i in range(j + 1, 8):
            lines.append(f"fma.rn.f32 x, ${error + i}, ${said + i * (i - 1) // 2 + j}, x;")
        lines.append(f"fma.rn.f32 x, x, {low - high:.1f}, ${error + j};")
        lines.append(f"sub.rn.f32 x, x, ${lanes + j};")
        lines.append(f"sub.rn.f32 ${j}, x, ${pieces + j};")
    return "{\n " + "\n ".join(lines) + "\n}"


def _sums(kept: bool) -> str:
    """Inputs: high and low halves of errors in pairs, sixteen registers of ``Lanes.between``, and
    where ``kept`` eight numbers; outputs: what the errors say, added to the numbers.

    A second product waits for its first no longer than for the three before it.
    """
    high, low, said, heard = 8, 12, 16, 32
    names = [f"{kind}{tile}{i}" for kind in "ab" for tile in range(4) for i in range(4)]
    lines = [f".reg .b32 {', '.join(names)}, none;", "mov.b32 none, 0;"]
    for q, kind in enumerate("ab"):
        for tile in range(3, -1, -1):
            before = [f"a{tile}{i}" if q else "none" for i in range(4)]
            if kept and not q:
                before[:2] = f"${heard + 2 * tile}", f"${heard + 2 * tile + 1}"
            into = ", ".join(f"{kind}{tile}{i}" for i in range(4))
            first = said + 4 * tile + 2 * q
            rows = f"${high + 2 * q}, ${low + 2 * q}, ${high + 2 * q + 1}, ${low + 2 * q + 1}"
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{into}}}, {{{rows}}}, "
                f"{{${first}, ${first + 1}}}, {{{', '.join(before)}}};"
            )
    for tile in range(3, -1, -1):
        for i in range(2):
            lines.append(f"add.rn.f32 ${2 * tile + i}, b{tile}{i}, b{tile}{i + 2};")
    return "{\n " + "\n ".join(lines) + "\n}"


def _halves() -> str:
    """Inputs: eight errors; outputs: their high halves in pairs, and what those leave of them."""
    lines = [".reg .b16 one, two;", ".reg .f32 x, y;"]
    for i in range(4):
        first, second = f"${8 + 2 * i}", f"${9 + 2 * i}"
        lines += [
            f"cvt.rn.f16x2.f32 ${i}, {second}, {first};", f"mov.b32 {{one, two}}, ${i};",
            "cvt.f32.f16 x, one;", "cvt.f32.f16 y, two;", f"sub.rn.f32 x, {first}, x;",
            f"sub.rn.f32 y, {second}, y;", f"cvt.rn.f16x2.f32 ${4 + i}, y, x;",
        ]  # fmt: skip
    return "{\n " + "\n ".join(lines) + "\n}"


_SAID = Constant(_sums(False))
_ADDED = Constant(_sums(True))
_HALVES = Constant(_halves())


@triton.constexpr_function
def _registers(out, given):
    return ",".join(["=&r"] * out + ["r"] * given)


@triton.constexpr_function
def _word(pieces):
    return tl.int32 if pieces <= 4 else tl.int64


@triton.jit
def round_in_lanes(
    parts, lanes, kv_head, inverse, shift, CODE: tl.constexpr, ZERO: tl.constexpr,
    NEAR: tl.constexpr, MEASURED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round rows in pieces [ROWS, 32]: the low byte of codes plus ``lift``, that of the first piece
    lowest in a word, and what rows cost where MEASURED (in squared steps, [ROWS]).

    inverse, shift: [ROWS], u = row * inverse + shift, without ZERO no shift. NEAR: ``lanes`` are of
    near pages (triton_in_turn_said).
    """
    PIECES: tl.constexpr = len(parts)
    QMAX: tl.constexpr = largest(CODE)
    LOW: tl.constexpr = smallest(CODE) if ZERO else -QMAX
    LIFTED: tl.constexpr = _ROUND + lift(CODE)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PIECE)[None, :]
    owner = column // 8 + row * 0
    at_own = lanes.own + kv_head * (PIECES * 128) + column + row * 0
    at_between = lanes.between + kv_head * (PIECES * (PIECES + 1) * 256)
    four = (row % 8 * 4 + owner) * 4 + column % 8 // 4 * 128 + column % 4
    at_between += tl.max_contiguous(tl.multiple_of(four, [1, 4]), [1, 4])
    at_weight = lanes.weight + kv_head * (PIECES * PIECE) + column + row * 0
    nothing = tl.zeros([ROWS, PIECE], tl.float32)
    # What pieces have heard, the last of those that are left first.
    heard = ()
    for _ in tl.static_range(PIECES):
        heard = heard + (nothing,)
    cost = tl.zeros([ROWS], tl.float32)
    words = tl.zeros([ROWS, PIECE], _word(PIECES))
    for piece in tl.static_range(PIECES - 1, -1, -1):
        own = own_said(parts[piece], at_own, piece, PIECES, NEAR)
        one, two = pair_said(parts[piece], at_between, piece, 0, PIECES)
        u = parts[piece] * inverse[:, None]
        if ZERO:
            u += shift[:, None]
        base = tl.inline_asm_elementwise(
            _prepared(LOW, QMAX), _registers(8, 48),
            [u, heard[0], own[0], own[1], own[2], own[3]], dtype=tl.float32, is_pure=True, pack=8,
        )  # fmt: skip
        said = ()
        sums = nothing
        errors = nothing
        for lane in tl.static_range(3, -1, -1):
            if lane == 3:
                errors = tl.inline_asm_elementwise(
                    _eight(LOW, QMAX, lane, True), _registers(8, 64),
                    [base, u, errors, own[0], own[1], own[2], own[3], owner],
                    dtype=tl.float32, is_pure=True, pack=8,
                )  # fmt: skip
            else:
                errors = tl.inline_asm_elementwise(
                    _eight(LOW, QMAX, lane, False), _registers(8, 72),
                    [base, u, errors, own[0], own[1], own[2], own[3], owner, sums],
                    dtype=tl.float32, is_pure=True, pack=8,
                )  # fmt: skip
            high, low = tl.inline_asm_elementwise(
                _HALVES, _registers(8, 8), [errors], dtype=(tl.float16, tl.float16), is_pure=True,
                pack=8,
            )  # fmt: skip
            if lane > 0:
                sums = tl.inline_asm_elementwise(
                    _SAID, _registers(8, 24), [high, low, one, two],
                    dtype=tl.float32, is_pure=True, pack=8,
                )  # fmt: skip
            if lane == 1:
                for i in tl.static_range(1, piece + 1):
                    said = said + pair_said(parts[piece], at_between, piece, i, PIECES)
        # An error and what it is of are the code but for a last bit.
        code = (errors + u + LIFTED).to(tl.int32, bitcast=True)
        words |= (code & 0xFF).to(words.dtype) << (8 * piece)
        if MEASURED:
            # What was said last is all that is said between lanes.
            off = tl.inline_asm_elementwise(
                _distances(LOW, QMAX), _registers(8, 56),
                [errors, own[0], own[1], own[2], own[3], sums, heard[0]],
                dtype=tl.float32, is_pure=True, pack=8,
            )  # fmt: skip
            cost += tl.sum(tl.load(at_weight + piece * PIECE) * off * off, 1)
        told = ()
        for i in tl.static_range(1, piece + 1):
            each = tl.inline_asm_elementwise(
                _ADDED, _registers(8, 32), [high, low, said[2 * i - 2], said[2 * i - 1], heard[i]],
                dtype=tl.float32, is_pure=True, pack=8,
            )  # fmt: skip
            told = told + (each,)
        heard = told
    return words, cost
