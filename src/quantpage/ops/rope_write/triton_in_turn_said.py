"""What channels of a kv_head say (``Lanes``), in memory that the threads of a program share.

Rows that are rounded in turn wait for these numbers all the time. A decode step reads each of them
once, and the compiler loads a number right before it is used; a copy that began while rows were on
their way it leaves alone. Numbers for rows of more than 128 channels find no room there (48 KB) and
are loaded.
"""

import triton
import triton.language as tl

from quantpage.ops.rope_write.triton_in_turn_rows import asked_for
from quantpage.ops.triton.common import Constant

_MEMORY = "said_of_kv_head"
SHARED_PIECES = Constant(4)
"""Rows of so many pieces have what is said to them in shared memory: first what pieces say to each
other (2,048 bytes a pair), then what lanes say to themselves (512 bytes a piece), for codes of the
body and for those of near pages."""


@triton.constexpr_function
def _copies(sizes, threads: int) -> str:
    """Inputs: from where; sizes: in pieces of sixteen bytes, one after the other."""
    lines = [
        ".reg .b32 first, to;", ".reg .b64 from;", ".reg .pred some;", "mov.u32 first, %tid.x;",
        "shl.b32 first, first, 4;", f"mov.u32 to, {_MEMORY};", "add.u32 to, to, first;",
    ]  # fmt: skip
    begin = 0
    for source, size in enumerate(sizes):
        lines += ["cvt.u64.u32 from, first;", f"add.s64 from, from, ${1 + source};"]
        for at in range(0, size, threads):
            lines += [
                f"setp.lt.u32 some, first, {16 * (size - at)};",
                f"@some cp.async.cg.shared.global [to+{begin + 16 * at}], [from+{16 * at}], 16;",
            ]
        begin += 16 * size
    lines += ["cp.async.commit_group;", "mov.b32 $0, 0;"]
    return f".shared .align 128 .b8 {_MEMORY}[{begin}];\n{{\n " + "\n ".join(lines) + "\n}"


_REGISTERS = Constant(",".join(["=&r"] * 8 + ["r"] * 8))
_THERE = Constant("cp.async.wait_all;\n bar.sync 0;\n mov.b32 $0, 0;")


@triton.constexpr_function
def _eight(first: int, lanes: int, each: int, apart: int) -> str:
    """Outputs: eight words of a lane, in fours that are ``apart`` bytes apart. lanes: that have
    words of their own, each ``each`` bytes after the other.
    """
    lines = [
        ".reg .b32 lane, at;", "mov.u32 lane, %laneid;", f"and.b32 lane, lane, {lanes - 1};",
        f"mov.u32 at, {_MEMORY};", f"mad.lo.u32 at, lane, {each}, at;",
        f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [at+{first}];",
        f"ld.shared.v4.b32 {{$4, $5, $6, $7}}, [at+{first + apart}];",
    ]  # fmt: skip
    return "{\n " + "\n ".join(lines) + "\n}"


@triton.jit
def ask_for_said(lanes, near_lanes, kv_head, PIECES: tl.constexpr, WARPS: tl.constexpr):
    """Have it copied, or what does not fit in the cache when it is needed."""
    PAIRS: tl.constexpr = PIECES * (PIECES + 1) * 64
    OWN: tl.constexpr = PIECES * 32
    if PIECES <= SHARED_PIECES:
        nothing = tl.zeros([32 * WARPS], tl.int64)
        pairs = nothing + (lanes.between + kv_head * (PAIRS * 4)).to(tl.int64)
        own = nothing + (lanes.own + kv_head * (OWN * 4)).to(tl.int64)
        if near_lanes is None:
            tl.inline_asm_elementwise(
                _copies((PAIRS, OWN), 32 * WARPS), "=r,l,l", [pairs, own],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            near = nothing + (near_lanes.own + kv_head * (OWN * 4)).to(tl.int64)
            tl.inline_asm_elementwise(
                _copies((PAIRS, OWN, OWN), 32 * WARPS), "=r,l,l,l", [pairs, own, near],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    else:
        line = tl.arange(0, triton.next_power_of_2(PAIRS // 8)) % (PAIRS // 8)
        asked_for(lanes.between + kv_head * (PAIRS * 4) + line * 32)
        line = tl.arange(0, triton.next_power_of_2(OWN // 8)) % (OWN // 8)
        asked_for(lanes.own + kv_head * (OWN * 4) + line * 32)


@triton.jit
def wait_for_said(PIECES: tl.constexpr, WARPS: tl.constexpr):
    """All threads of a program have what was asked for."""
    if PIECES <= SHARED_PIECES:
        tl.inline_asm_elementwise(
            _THERE, "=r,r", [tl.arange(0, 32 * WARPS)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _own(rows, FIRST: tl.constexpr):
    """Of lane 4 g + t of a warp what lies at 32 t, where ``rows`` lies as rows do."""
    return tl.inline_asm_elementwise(
        _eight(FIRST, 4, 32, 16), _REGISTERS, [rows], dtype=tl.float32, is_pure=False, pack=8
    )


@triton.jit
def _pair(rows, FIRST: tl.constexpr):
    """Of every lane of a warp what lies at 16 lane, in fours."""
    return tl.inline_asm_elementwise(
        _eight(FIRST, 32, 16, 512), _REGISTERS, [rows], dtype=tl.int32, is_pure=False, pack=8
    )


@triton.jit
def own_said(rows, at, PIECE: tl.constexpr, PIECES: tl.constexpr, NEAR: tl.constexpr):
    """32 numbers a lane in four tensors: what its eight channels of a piece say to each other.

    at: where a lane's first are. NEAR: for codes of near pages.
    """
    if PIECES <= SHARED_PIECES:
        FIRST: tl.constexpr = (PIECES * (PIECES + 1) * 2 + (PIECES if NEAR else 0) + PIECE) * 512
        return (
            _own(rows, FIRST),
            _own(rows, FIRST + 128),
            _own(rows, FIRST + 256),
            _own(rows, FIRST + 384),
        )
    else:
        at += PIECE * 128
        return tl.load(at), tl.load(at + 32), tl.load(at + 64), tl.load(at + 96)


@triton.jit
def pair_said(rows, at, PIECE: tl.constexpr, BACK: tl.constexpr, PIECES: tl.constexpr):
    """16 words a lane in two tensors: what a piece says to the one that is BACK before it."""
    PAIR: tl.constexpr = PIECE * (PIECE + 1) // 2 + BACK
    if PIECES <= SHARED_PIECES:
        return (
            _pair(rows, PAIR * 2048),
            _pair(rows, PAIR * 2048 + 1024),
        )
    else:
        return tl.load(at + PAIR * 512), tl.load(at + PAIR * 512 + 256)
