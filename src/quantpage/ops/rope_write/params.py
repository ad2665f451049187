"""What happens to a token's Q, K and V between the projection and the page."""

from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.rope import RopeTable


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMS norm of each head of Q and K (Qwen3, Gemma 3).

    Raises ValueError for weights of unlike size or another dtype, and an eps below 0.
    """

    q_weight: Float[Tensor, " head_dim"]
    k_weight: Float[Tensor, " head_dim"]
    eps: float = 1e-6
    after_rope: bool = False
    """False: norm, then rotate (Qwen3); True: rotate, then norm (ERNIE)."""

    def __post_init__(self) -> None:
        if not (isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps: expected a finite number of at least 0, got {self.eps}")
        for name, weight in (("q_weight", self.q_weight), ("k_weight", self.k_weight)):
            if weight.ndim != 1 or not weight.is_floating_point():
                raise ValueError(
                    f"{name}: expected floating numbers [head_dim], got {weight.dtype} "
                    f"{tuple(weight.shape)}"
                )
            if weight.is_neg() or not weight.is_contiguous():
                object.__setattr__(self, name, weight.resolve_neg().contiguous())
        if self.q_weight.shape != self.k_weight.shape:
            raise ValueError(
                f"k_weight: expected {self.q_weight.shape[0]} weights as q_weight, "
                f"got {self.k_weight.shape[0]}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class WriteFacts:
    """What a check asks of the parameters: one object for all that are alike."""

    rope: tuple[int, int] | None
    """Positions and channels of the rotation table."""
    norm: int | None
    """Weights of a norm."""
    bias: tuple[tuple[int, ...], ...] | None
    """Shapes of the three."""
    devices: tuple[torch.device, ...]
    """Of all tensors."""
    checked: bool


_facts_of = lru_cache(maxsize=1024)(WriteFacts)


@dataclass(frozen=True, slots=True)
class WriteParams:
    """bias -> [norm] -> RoPE -> [norm] -> key map -> Hadamard -> quantize -> scatter.

    The key map and what follows belong to the pages. Raises ValueError for biases that are not
    three, [heads, head_dim] each.
    """

    rope: RopeTable | None = None
    """None: Q and K come rotated by the model."""
    norm: QKNorm | None = None
    bias: tuple[Tensor, Tensor, Tensor] | None = None
    """Of q, k, v: [heads, head_dim] each, added first (Qwen2)."""
    return_rows: bool = False
    """True: hand back the round-tripped K and V rows for the chunk's own attention."""
    checked: bool = False
    """True: raise NonFiniteInput for a NaN or infinity in k or v, and check the page ids of a plan
    that is on a GPU. Reads back from the device."""
    layer: int = 0
    """Named in errors."""
    facts: WriteFacts = field(init=False, repr=False, compare=False)
    """What checks ask of the parameters."""

    def __post_init__(self) -> None:
        tensors: list[Tensor] = []
        if self.rope is not None:
            tensors += (self.rope.cos, self.rope.sin)
        if self.norm is not None:
            tensors += (self.norm.q_weight, self.norm.k_weight)
        if self.bias is not None:
            if len(self.bias) != 3:
                raise ValueError(f"bias: expected three, of q, k and v, got {len(self.bias)}")
            for name, each in zip("qkv", self.bias, strict=True):
                if each.ndim != 2 or not each.is_floating_point():
                    raise ValueError(
                        f"bias of {name}: expected floating numbers [heads, head_dim], got "
                        f"{each.dtype} {tuple(each.shape)}"
                    )
            plain = tuple(each.resolve_neg() for each in self.bias)
            object.__setattr__(self, "bias", plain)
            tensors += plain
        facts = _facts_of(
            None if self.rope is None else (self.rope.cos.shape[0], self.rope.rotary_dim),
            None if self.norm is None else self.norm.q_weight.shape[0],
            None if self.bias is None else tuple(tuple(each.shape) for each in self.bias),
            tuple(dict.fromkeys(each.device for each in tensors)),
            self.checked,
        )
        object.__setattr__(self, "facts", facts)


class Written(NamedTuple):
    """What rope_write hands back, all in the basis of the cache."""

    q: Tensor | None
    """[tokens, q_heads, query_dim], in the query's dtype."""
    k_rows: Tensor | None
    """[tokens, kv_heads, head_dim]: what the cache now holds, dequantized, in k's dtype."""
    v_rows: Tensor | None
