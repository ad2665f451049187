"""Rotation tables for rotary position embedding (RoFormer, arXiv 2104.09864).

    half-split   (x1, x2) = x[:r/2], x[r/2:r]     Llama, Qwen, Gemma
    interleaved  (x1, x2) = x[0:r:2], x[1:r:2]    GPT-J, GLM
    both         (x1 cos - x2 sin, x2 cos + x1 sin)

r is rotary_dim; channels past it pass through (partial rotation). Tables are float32 and the
rotation is computed in float32 whatever the model's dtype.
"""

from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin of every position. Raises ValueError for two of unlike shape or dtype."""

    cos: Float[Tensor, "positions half_rotary"]
    sin: Float[Tensor, "positions half_rotary"]
    interleaved: bool = False
    """False: channel i pairs with i + rotary_dim / 2; True: channel 2i with 2i + 1."""

    def __post_init__(self) -> None:
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            if table.ndim != 2 or table.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name}: expected float32 [positions, rotary_dim / 2], got {table.dtype} "
                    f"{tuple(table.shape)}"
                )
            if table.is_neg() or not table.is_contiguous():
                object.__setattr__(self, name, table.resolve_neg().contiguous())
        if self.cos.shape != self.sin.shape or self.cos.device != self.sin.device:
            raise ValueError(
                f"sin: expected {tuple(self.cos.shape)} on {self.cos.device} as cos, "
                f"got {tuple(self.sin.shape)} on {self.sin.device}"
            )

    @property
    def rotary_dim(self) -> int:
        """Channels that are rotated."""
        return 2 * self.cos.shape[-1]


def rope_table(
    max_positions: int,
    rotary_dim: int,
    theta: float = 10000.0,
    interleaved: bool = False,
    device: torch.device | str = "cpu",
) -> RopeTable:
    """The standard table: angle(p, i) = p * theta^(-2i / rotary_dim).

    rotary_dim: channels that are rotated, an even number. interleaved: as RopeTable has it. Raises
    ValueError for sizes that cannot be.
    """
    if rotary_dim % 2 or rotary_dim < 2:
        raise ValueError(f"rotary_dim: expected an even number of at least 2, got {rotary_dim}")
    if max_positions < 1 or not (isfinite(theta) and theta > 0):
        raise ValueError(
            f"max_positions, theta: expected at least 1 and a finite number above 0, "
            f"got {max_positions} and {theta}"
        )
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
    angles = torch.arange(max_positions, dtype=torch.float64, device="cpu")[:, None] * theta**-steps
    return RopeTable(angles.cos().float().to(device), angles.sin().float().to(device), interleaved)


def apply_rope(
    x: Float[Tensor, "tokens heads head_dim"],
    positions: Int[Tensor, " tokens"],
    table: RopeTable,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Rotate every head of every token to its position; at least float32, unrounded."""
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    cos = table.cos[positions].to(work.dtype)[:, None]
    sin = table.sin[positions].to(work.dtype)[:, None]
    turned, passed = work[..., : table.rotary_dim], work[..., table.rotary_dim :]
    if table.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pair = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([pair.flatten(-2), passed], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, passed], dim=-1)
