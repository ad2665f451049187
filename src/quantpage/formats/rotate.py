"""Orthonormal Hadamard rotation of a head's channels.

A rotation spreads an outlier channel over all channels, which is what makes 4 bits usable
(QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). H is symmetric and orthonormal, H H = 1,
so that ``(H q) . (H k) = q . k``: keys are cached rotated and queries are rotated to match; values
are cached rotated and the attention output, a linear combination of them, is rotated back.

head_dim is cut into the largest power-of-two block that divides it and each block is rotated by
itself: 128 is one block of 128, 80 is five blocks of 16, 96 is three of 32.
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.autocast import in_own_dtypes


def rotation_block(head_dim: int) -> int:
    """The largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


@lru_cache
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix [size, size]; size is a power of two."""
    # The matrix is kept: made in inference mode it could not take part in autograd later.
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / size**0.5).to(dtype=dtype, device=device)


@in_own_dtypes
def rotate(x: Float[Tensor, "*rows head_dim"]) -> Float[Tensor, "*rows head_dim"]:
    """``H x`` block by block, in at least float32; its own inverse. The dtype is kept."""
    block = rotation_block(x.shape[-1])
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    matrix = hadamard_matrix(block, work.dtype, work.device)
    # Sizes spelled out: -1 cannot be told where there are no rows.
    turned = work.reshape(*x.shape[:-1], x.shape[-1] // block, block) @ matrix
    return turned.reshape(x.shape).to(x.dtype)
