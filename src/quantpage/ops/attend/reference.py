"""The true statement of attention over quantized pages; the oracle of every implementation.

One request at a time, everything dequantized and every score materialized, in float64 where the
query is float64. Read this first.
"""

import torch

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops.attend.params import AttendParams, exact_pairs
from quantpage.ops.attend.shown_values import refuse_to_hide, weighted_sum
from quantpage.ops.checks import Needs, attends, unchecked
from quantpage.ops.gather.reference import gather_request
from quantpage.ops.rows import LogSumExps, Outputs, Queries


@attends(Needs(host_lengths=True))
def attend(
    q: Queries, layer: LayerKV, batch: BatchPlan, params: AttendParams
) -> tuple[Outputs, LogSumExps]:
    """Output and natural log-sum-exp, float64, in the basis of the cache.

    A query that may see nothing gives output 0 and log-sum-exp -inf. A query that is not finite,
    or that sees a key or a value that is not, gives NaN; what it does not see changes nothing.
    """
    q_heads, group = q.shape[1], q.shape[1] // layer.kv_heads
    out = torch.zeros(q.shape[0], q_heads, layer.facts.out_dim, dtype=torch.float64, device="cpu")
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64, device="cpu")
    row = 0
    for request, (new, context) in enumerate(
        zip(batch.query_lens, batch.host_context_lens, strict=True)
    ):
        rows = slice(row, row + new)
        row += new
        positions = batch.positions[rows].cpu()
        for head in range(q_heads):
            k, v, exact = _keys_and_values(layer, batch, request, context, head // group)
            own = refuse_to_hide(q[rows, head].cpu().double())
            scores = _scores(own, positions, k, exact, batch.page_size)
            scores = scores * params.softmax_scale
            if params.softcap is not None:
                scores = params.softcap * torch.tanh(scores / params.softcap)
            seen = params.mask.materialize(positions, context, request, head // group)
            scores = scores.masked_fill(~seen, -torch.inf)
            if params.sinks is not None:
                sink = params.sinks[head].cpu().double().expand(new, 1)
            else:
                sink = torch.full((new, 1), -torch.inf, dtype=torch.float64, device="cpu")
            total = torch.logsumexp(torch.cat([scores, sink], 1), 1)
            weights = torch.exp(scores - total.masked_fill(total.isneginf(), 0.0)[:, None])
            if exact is None:
                out[rows, head] = weighted_sum(weights, v[0], seen)
            else:
                near = exact_pairs(positions, torch.arange(context, device="cpu"), batch.page_size)
                for part, shown in zip(v, (seen & ~near, seen & near), strict=True):
                    out[rows, head] += weighted_sum(weights.masked_fill(~shown, 0.0), part, shown)
            lse[rows, head] = total
    return out, lse


def _keys_and_values(layer, batch, request, context, kv_head):
    """Codes dequantized, and exact rows beside them where the format keeps some."""
    k, v = _halves(layer, batch.page_table[request], context, kv_head)
    if layer.exact_key is None or batch.exact is None:
        return [k], [v], None
    exact_table = batch.exact.page_table[request].clamp_min(0)
    near_k, near_v = _halves(layer.exact(), exact_table, context, kv_head)
    return [k, near_k], [v, near_v], True


def _halves(layer, table, context, kv_head):
    gather = unchecked(gather_request)
    first, second = (
        gather(half, table, context, torch.float64)[:, kv_head].cpu()
        for half in (layer.key, layer.value)
    )
    # A latent row is the value, and the first channels of the key.
    return (torch.cat([first, second], 1), first) if layer.latent else (first, second)


def _scores(q, positions, k, exact, page_size):
    scores = q @ k[0].T
    if exact is None:
        return scores
    near = exact_pairs(positions, torch.arange(k[0].shape[0], device="cpu"), page_size)
    return torch.where(near, q @ k[1].T, scores)
