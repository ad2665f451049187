"""What the mask bench measures: the twelve kinds, and a layer to run them on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage import masks
from quantpage.batch import BatchPlan, plan_batch
from quantpage.bench.cases import PAGE
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import FORMATS, quantize
from quantpage.masks import ColumnIntervals
from quantpage.ops.gather.triton import gather_layer

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP = Q_HEADS // KV_HEADS
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True, slots=True)
class Made:
    """Requests of one length over an int8 layer whose pages lie in random order."""

    q: Float[Tensor, "tokens q_heads head_dim"]
    layer: LayerKV
    batch: BatchPlan
    k: Float[Tensor, "kv_heads context head_dim"]
    """What the first request's cache holds, in bfloat16."""
    v: Float[Tensor, "kv_heads context head_dim"]


def make(context: int, new: int | None = None, requests: int = 1) -> Made:
    """``new`` queries (None: all) at the end of ``context`` tokens, a request."""
    torch.manual_seed(context)
    new = context if new is None else new
    spec, each = FORMATS["int8"].key, -(-context // PAGE)
    halves = []
    for _ in range(2):
        rows = torch.randn(requests * each, KV_HEADS, PAGE, HEAD_DIM, device="cuda")
        halves.append(QuantizedPages(spec, *quantize(rows, spec)[:2]))
    layer = LayerKV(halves[0], halves[1])
    order = torch.randperm(requests * each).tolist()
    tables = [order[at * each : (at + 1) * each] for at in range(requests)]
    batch = plan_batch([new] * requests, [context] * requests, tables, PAGE, "cuda")
    size = (requests * new, Q_HEADS, HEAD_DIM)
    q = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    span = torch.tensor([[0, 0, context, context, 0]], dtype=torch.int32, device="cuda")
    k, v = (torch.empty(KV_HEADS, context, HEAD_DIM, device="cuda").bfloat16() for _ in "kv")
    gather_layer(layer, batch.page_table, span, context, (k, v))
    return Made(q, layer, batch, k, v)


def kinds(n: int) -> dict[str, ColumnIntervals]:
    """The twelve of FlashMask, scaled to ``n`` tokens."""
    part = n // 8
    noise = torch.Generator().manual_seed(0)
    keys = torch.arange(n)
    gone = keys + 1 + (torch.rand(n, generator=noise) * (n - keys)).long()
    return {
        "causal": masks.causal(n),
        "full": masks.full(n),
        "sliding_window": masks.sliding_window(n, part),
        "causal_document": masks.causal_document([part] * 8),
        "document": masks.document([part] * 8),
        "shared_question": masks.shared_question(part, [part] * 7),
        "global_sliding_window": masks.global_sliding_window(n, 64, part // 2),
        "causal_blockwise": masks.causal_blockwise([part] * 8),
        "prefix_lm": masks.prefix_lm(n, 2 * part + 37),
        "prefix_lm_document": masks.prefix_lm_document([(part // 4 + 5, part)] * 8),
        "qk_sparse": masks.qk_sparse(n, [(2 * part + 11, part // 2), (5 * part, part // 3)]),
        "random_eviction": masks.random_eviction(gone),
    }


def visible_pairs(mask: ColumnIntervals, n: int) -> int:
    """Pairs among n queries and n keys that the mask shows."""
    hidden = mask.hidden_rows(torch.arange(n))
    lts, lte, uts, ute = (each.clamp(max=n) for each in hidden)
    lower, upper = (lte - lts).clamp(min=0), (ute - uts).clamp(min=0)
    both = (torch.minimum(lte, ute) - torch.maximum(lts, uts)).clamp(min=0)
    both = torch.where((lower > 0) & (upper > 0), both, 0)
    return int((n - lower - upper + both).sum())
