"""Codes in planes as the write kernel stores them: bytes of a plane from pieces of rows."""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from quantpage.ops.triton.planes import high_bits, low_bits


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
