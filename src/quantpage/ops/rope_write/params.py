"""What happens to a token's Q, K and V between the projection and the page."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from quantpage.rope import RopeTable


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMS norm of each head of Q and K (Qwen3, Gemma 3)."""

    q_weight: Float[Tensor, " head_dim"]
    k_weight: Float[Tensor, " head_dim"]
    eps: float = 1e-6
    after_rope: bool = False
    """False: norm, then rotate (Qwen3); True: rotate, then norm (ERNIE)."""


@dataclass(frozen=True, slots=True)
class WriteParams:
    """bias -> [norm] -> RoPE -> [norm] -> key map -> Hadamard -> quantize -> scatter.

    The key map and what follows belong to the pages.
    """

    rope: RopeTable | None = None
    """None: Q and K come rotated by the model."""
    norm: QKNorm | None = None
    bias: tuple[Tensor, Tensor, Tensor] | None = None
    """Of q, k, v: [heads, head_dim] each, added first (Qwen2)."""
    return_rows: bool = False
    """True: hand back the round-tripped K and V rows for the chunk's own attention."""
    checked: bool = False
    """True: raise NonFiniteInput for a NaN or infinity in k or v. Reads back from the device."""
    layer: int = 0
    """Named in errors."""


class Written(NamedTuple):
    """What rope_write hands back, all in the basis of the cache."""

    q: Tensor | None
    """[tokens, q_heads, head_dim], in the query's dtype."""
    k_rows: Tensor | None
    """[tokens, kv_heads, head_dim]: what the cache now holds, dequantized, in k's dtype."""
    v_rows: Tensor | None
