"""Where an attention kernel writes: the caller's memory, or new."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Results(NamedTuple):
    """Output and natural log-sum-exp of a call."""

    out: Float[Tensor, "tokens q_heads value_dim"]
    lse: Float[Tensor, "tokens q_heads"] | None
    """float32 and contiguous; None: nobody reads it, and kernels do not write it."""


def results_for(
    q: Tensor,
    value_dim: int,
    final: bool,
    out: Tensor | None = None,
    lse_wanted: bool = True,
) -> Results:
    """To be written. final: False for partial results, which stay in float32 until they are merged.

    out: the caller's memory for a final result, in the query's dtype; None: new.
    """
    if out is None:
        dtype = q.dtype if final else torch.float32
        out = torch.empty(*q.shape[:2], value_dim, dtype=dtype, device=q.device)
    lse = None
    if lse_wanted:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    return Results(out, lse)


def contiguous(out: Tensor | None) -> Tensor | None:
    """``out`` for kernels whose rows have no gaps between; None, for new, where it has some."""
    return out if out is not None and out.is_contiguous() else None
