"""RMS norm (arXiv 1910.07467) of a model's activations on a GPU, in one launch."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

MAX_WIDTH = 16384
"""Channels of a row, which one program holds in registers."""


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, weight, out, rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """weight * (x / sqrt(mean(x^2) + eps)), rounded to x's dtype before and after the product."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK)
    inside = channel < WIDTH
    at = row.to(tl.int64)[:, None] * WIDTH + channel[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    each = tl.load(x + at, mask, 0.0).to(tl.float32)
    mean = tl.sum(each * each, 1) * (1.0 / WIDTH)
    normed = (each * tl.rsqrt(mean + eps)[:, None]).to(x.dtype.element_ty)
    by = tl.load(weight + channel, inside, 0.0).to(tl.float32)
    tl.store(out + at, (by[None, :] * normed.to(tl.float32)).to(out.dtype.element_ty), mask)


def rms_norm(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "*rows width"]:
    """``weight * (x * rsqrt(mean(x^2) + eps))`` with Llama's roundings in Transformers.

    weight: of x's dtype. At most MAX_WIDTH channels.
    """
    width = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // width if width else 0
    if rows:
        block = triton.next_power_of_2(width)
        # Heads are short rows, of which a program takes several.
        tile = max(1, 1024 // block)
        norm_kernel[(triton.cdiv(rows, tile),)](
            x, weight.contiguous(), out, rows, eps,
            WIDTH=width, BLOCK=block, TILE=tile, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    return out
