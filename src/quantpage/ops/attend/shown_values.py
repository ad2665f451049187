"""Sums in which a hidden number that is not finite cannot be seen, and a visible one cannot hide.

A mask selects. Multiplying a hidden value by a weight of zero is not the same: 0 * NaN is NaN. So
values that are not finite leave the matrix product, channels of the queries that see one become
NaN, and a query that is not finite makes its own result NaN and no other's.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def weighted_sum(
    weights: Float[Tensor, "*heads queries keys"],
    values: Float[Tensor, "*heads keys value_dim"],
    seen: Bool[Tensor, "*#heads queries keys"] | None,
) -> Float[Tensor, "*heads queries value_dim"]:
    """``weights @ values`` over the keys that each query sees; None: over all keys.

    weights: 0 where a key is hidden. seen may have one head for all.
    """
    if seen is None:
        return weights @ values
    bad = ~values.isfinite()
    if values.device.type == "cpu" and not bool(bad.any()):
        # Elsewhere asking would wait for the device.
        return weights @ values
    found = weights @ values.masked_fill(bad, 0.0)
    reached = seen.to(values.dtype) @ bad.to(values.dtype) > 0
    return found.masked_fill(reached, torch.nan)


def refuse_to_hide(q: Float[Tensor, "*rows head_dim"]) -> Float[Tensor, "*rows head_dim"]:
    """The queries; all channels NaN where one is not finite, so that every score is."""
    return torch.where(q.isfinite().all(-1, keepdim=True), q, torch.nan)
