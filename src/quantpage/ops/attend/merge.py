"""Joining partial attention results by their log-sum-exp.

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

Online softmax over disjoint sets of keys (FlashDecoding; arXiv 2501.01005 section 2). An empty
partial (lse -inf) is selected away, never multiplied by zero: it may hold NaN. A sink logit is one
more key with no value; it enters here, once.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def merge_partials(
    outs: list[Float[Tensor, "tokens q_heads value_dim"]],
    lses: list[Float[Tensor, "tokens q_heads"]],
    sinks: Float[Tensor, " q_heads"] | None = None,
    out: Float[Tensor, "tokens q_heads value_dim"] | None = None,
) -> tuple[Float[Tensor, "tokens q_heads value_dim"], Float[Tensor, "tokens q_heads"]]:
    """Merge; where every partial is empty and there is no sink, output 0 and lse -inf.

    out: where the output goes; None: new, at least float32.
    """
    stacked = torch.stack(lses)
    if sinks is not None:
        sink = sinks.to(stacked.dtype).expand(1, *stacked.shape[1:])
        lse = torch.logsumexp(torch.cat([stacked, sink]), 0)
    else:
        lse = torch.logsumexp(stacked, 0)
    anchor = lse.masked_fill(lse.isneginf(), 0.0)
    total = torch.zeros_like(outs[0], dtype=torch.promote_types(outs[0].dtype, torch.float32))
    for partial, own in zip(outs, lses, strict=True):
        weight = torch.exp(own - anchor).unsqueeze(-1).to(total.dtype)
        total += torch.where(own.isneginf().unsqueeze(-1), 0.0, partial * weight)
    return total if out is None else out.copy_(total), lse
