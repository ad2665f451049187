"""The Hadamard rotation of formats/rotate on a GPU: rows in registers, and whole outputs."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from quantpage.formats.rotate import rotation_block


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """formats/rotate: butterflies of neighbours 1, 2, 4, ... BLOCK / 2 channels apart."""
    STAGES: tl.constexpr = BLOCK.bit_length() - 1
    # (a, b) -> (a + b, a - b) as (sum, sum - 2 b): a sum over two neighbours needs no change of
    # layout, so that a stage is a shuffle and two additions.
    side = tl.where(tl.arange(0, 2) == 0, 0.0, -2.0)[None, None, :, None]
    for i in tl.static_range(STAGES):
        y = tl.reshape(x, [ROWS, WIDTH // (2 << i), 2, 1 << i])
        x = tl.reshape(tl.sum(y, 2, keep_dims=True) + y * side, [ROWS, WIDTH])
    return x * (1.0 / (BLOCK**0.5))


@triton.jit(do_not_specialize=["rows"])
def _rotate_kernel(
    x, rows, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, WIDTH)
    at = x + row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    mask = (row < rows)[:, None] & (channel < HEAD_DIM)[None, :]
    turned = hadamard(tl.load(at, mask, 0.0).to(tl.float32), TILE, WIDTH, BLOCK)
    tl.store(at, turned.to(x.dtype.element_ty), mask)


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
