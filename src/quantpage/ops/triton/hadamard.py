"""The Hadamard rotation of formats/rotate on a GPU: rows in registers, and whole outputs."""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantpage.formats.rotate import rotation_block


@triton.jit
def _butterflies(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Unscaled, of one tensor: neighbours 1, 2, 4, ... BLOCK / 2 channels apart."""
    STAGES: tl.constexpr = BLOCK.bit_length() - 1
    # (a, b) -> (a + b, a - b) as (sum, sum - 2 b): a sum over two neighbours needs no change of
    # layout, so that a stage is additions, and a shuffle where another thread has the neighbour.
    second = (tl.arange(0, 2) == 1)[None, None, :, None]
    side = tl.where(second, -2.0, 0.0)
    for i in tl.static_range(STAGES):
        y = tl.reshape(x, [ROWS, WIDTH // (2 << i), 2, 1 << i])
        both = tl.sum(y, 2, keep_dims=True)
        if i < 3:
            # A thread holds eight neighbours: the choice is made at compile time.
            x = tl.reshape(tl.where(second, both - 2.0 * y, both), [ROWS, WIDTH])
        else:
            x = tl.reshape(both + y * side, [ROWS, WIDTH])
    return x


@triton.jit
def hadamard(
    parts, ROWS: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    FOLDED: tl.constexpr = False,
):  # fmt: skip
    """formats/rotate, unscaled, of rows cut into pieces: a tuple of [ROWS, PIECE].

    FOLDED: whoever made the rows has done the stage of halves of a block.
    """
    INSIDE: tl.constexpr = min(BLOCK, PIECE)
    turned = ()
    for i in tl.static_range(len(parts)):
        turned = turned + (_butterflies(parts[i], ROWS, PIECE, INSIDE),)
    return between_pieces(turned, (BLOCK // INSIDE).bit_length() - 1 - FOLDED)


@triton.jit
def between_pieces(turned, STAGES: tl.constexpr):
    """Stages of pieces 1, 2, 4, ... apart: additions of a thread's own registers."""
    for stage in tl.static_range(STAGES):
        mixed = ()
        for i in tl.static_range(len(turned)):
            other = turned[i ^ (1 << stage)]
            if (i >> stage) % 2 == 0:
                mixed = mixed + (turned[i] + other,)
            else:
                mixed = mixed + (other - turned[i],)
        turned = mixed
    return turned


@triton.jit(do_not_specialize=["rows"])
def _rotate_kernel(
    x, rows, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, WIDTH)
    at = x + row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    mask = (row < rows)[:, None] & (channel < HEAD_DIM)[None, :]
    turned = hadamard((tl.load(at, mask, 0.0).to(tl.float32),), TILE, WIDTH, BLOCK)
    tl.store(at, (turned[0] * (1.0 / (BLOCK**0.5))).to(x.dtype.element_ty), mask)


def rotate_in_place(x: Float[Tensor, "*rows head_dim"]) -> Float[Tensor, "*rows head_dim"]:
    """``formats.rotate`` of a contiguous tensor on a GPU in one launch; ``x`` is overwritten."""
    if not x.is_contiguous():
        raise ValueError(f"x: expected a contiguous tensor, got strides {x.stride()}")
    width = x.shape[-1]
    rows = x.numel() // width
    if rows:
        # A decode step has few rows: small tiles spread them over the device.
        tile = 2 if rows <= 4096 else 16
        _rotate_kernel[(triton.cdiv(rows, tile),)](
            x,
            rows,
            HEAD_DIM=width,
            WIDTH=triton.next_power_of_2(width),
            BLOCK=rotation_block(width),
            TILE=tile,
            num_warps=1 if tile == 2 else 4,
        )
    return x
