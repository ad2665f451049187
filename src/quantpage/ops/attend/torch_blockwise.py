"""Attention over quantized pages in plain torch, tile by tile: the path that always works.

Online softmax (FlashAttention, arXiv 2205.14135) over tiles of pages. Only one tile of keys and
values is ever dequantized, and only one tile of scores exists, so that memory does not grow with
the prompt. Tiles that the mask hides from the whole query tile are not read, and tiles that it
shows whole are not masked.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.ops.attend.interval.plan import EMPTY, FULL, tile_kinds
from quantpage.ops.attend.params import AttendParams, Segment, exact_band, exact_pairs
from quantpage.ops.attend.shown_values import refuse_to_hide, weighted_sum
from quantpage.ops.checks import Needs, attends, unchecked
from quantpage.ops.gather.reference import gather_request
from quantpage.ops.rows import LogSumExps, Outputs, Queries

QUERY_TILE = 256
KEY_TILE = 512


@attends(Needs(host_lengths=True))
def attend(
    q: Queries, layer: LayerKV, batch: BatchPlan, params: AttendParams, segment: Segment = "all"
) -> tuple[Outputs, LogSumExps]:
    """Output and natural log-sum-exp, in float32 (float64 for float64 queries)."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(q.shape[0], q.shape[1], layer.facts.out_dim, dtype=work)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=work)
    start = 0
    for request, (new, context) in enumerate(
        zip(batch.query_lens, batch.host_context_lens, strict=True)
    ):
        for first in range(start, start + new, QUERY_TILE):
            rows = slice(first, min(first + QUERY_TILE, start + new))
            position = context - new + first - start
            out[rows], lse[rows] = _query_tile(
                q[rows].to(work), layer, batch, params, segment, request, position, context
            )
        start += new
    return out, lse


def _query_tile(q, layer, batch, params, segment, request, first, context):
    """One tile of queries at positions first.. against every key tile that it may see."""
    tokens, q_heads, _ = q.shape
    kv_heads = layer.kv_heads
    group = q_heads // kv_heads
    # [kv_heads, group * tokens, head_dim]: the group shares its keys, so it is one matrix product.
    grouped = refuse_to_hide(q).view(tokens, kv_heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2)
    peak = q.new_full((kv_heads, group * tokens, 1), -torch.inf)
    total = torch.zeros_like(peak)
    acc = q.new_zeros(kv_heads, group * tokens, layer.facts.out_dim)
    if params.sinks is not None:
        sink = params.sinks.to(q.dtype).view(kv_heads, group, 1).expand(kv_heads, group, tokens)
        peak = sink.reshape(kv_heads, group * tokens, 1).clone()
        total = torch.ones_like(peak)
    queries = torch.arange(first, first + tokens, device=q.device)
    for low, high, whole in _key_tiles(
        batch.page_size, params, segment, request, first, tokens, context, kv_heads
    ):
        k, v = _keys_and_values(layer, batch.page_table[request], low, high, q.dtype)
        scores = (grouped @ k.mT) * params.softmax_scale
        if params.softcap is not None:
            scores = torch.tanh(scores / params.softcap) * params.softcap
        seen = None
        if not whole:
            keys = torch.arange(low, high, device=q.device)
            seen = _visible(params, segment, batch.page_size, queries, keys, request, kv_heads)
            scores = scores.unflatten(1, (group, tokens)).masked_fill(~seen[:, None], -torch.inf)
            scores = scores.flatten(1, 2)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        anchor = new_peak.masked_fill(new_peak.isneginf(), 0.0)
        weights = torch.exp(scores - anchor)
        shrink = torch.exp(peak - anchor)
        if seen is not None:
            seen = seen[:, None].expand(-1, group, -1, -1).flatten(1, 2)
        acc = acc * shrink + weighted_sum(weights, v, seen)
        total = total * shrink + weights.sum(-1, keepdim=True)
        peak = new_peak
    # A total of 0 is a query that sees nothing; NaN is no such thing and stays.
    lse = torch.where(total == 0, -torch.inf, peak + total.log())
    acc = torch.where(total == 0, 0.0, acc / total)
    return (
        acc.view(kv_heads, group, tokens, -1).permute(2, 0, 1, 3).flatten(1, 2),
        lse.view(kv_heads, group, tokens).permute(2, 0, 1).flatten(1, 2),
    )


def _key_tiles(
    page_size: int, params: AttendParams, segment: Segment, request, first, tokens, context, heads
) -> Iterator[tuple[int, int, bool]]:
    """Half-open tiles of key positions, starting on page borders; True: all pairs are visible."""
    last = first + tokens - 1
    shown = params.mask.key_range(first, last, context, request)
    for low, high in segment_ranges(segment, page_size, first, last, context):
        low, high = max(low, shown[0]), min(high, shown[1])
        start = low // page_size * page_size
        starts = range(start, high, KEY_TILE)
        kinds = _tile_kinds(params, request, (first, last + 1), (start, high), heads)
        for tile, empty, whole in zip(starts, *kinds, strict=True):
            if not empty:
                yield tile, min(tile + KEY_TILE, high), whole and segment == "all"


def _tile_kinds(
    params: AttendParams, request: int, queries: tuple[int, int], keys: tuple[int, int], heads: int
) -> tuple[list[bool], list[bool]]:
    """Of each key tile: hidden from the whole query tile, and shown to all of it."""
    mask = params.mask
    count = len(range(keys[0], keys[1], KEY_TILE))
    if not count or mask.kind != "interval":
        # ``key_range`` has left out what the others hide, as far as they say.
        return [False] * count, [False] * count
    kinds = torch.stack(
        [
            tile_kinds(mask, queries, keys, KEY_TILE, request, head)
            for head in range(heads if mask.per_head else 1)
        ]
    )
    return (kinds == EMPTY).all(0).tolist(), (kinds == FULL).all(0).tolist()


def segment_ranges(
    segment: Segment, page_size: int, first: int, last: int, context: int
) -> list[tuple[int, int]]:
    """Key ranges that hold every key of ``segment`` for queries first..last (inclusive)."""
    if segment == "all":
        return [(0, context)]
    # A mask may show keys after the query: body pages exist on both sides of the query's page.
    if segment == "body":
        return [(page_size, context)]
    low, high = exact_band(first, last, page_size)
    if low <= page_size:
        return [(0, min(high, context))]
    return [(0, min(page_size, context)), (low, min(high, context))]


def _visible(params, segment, page_size, queries, keys, request, kv_heads) -> Tensor:
    """[kv_heads or 1, queries, keys]."""
    heads = range(kv_heads) if params.mask.per_head else range(1)
    seen = torch.stack([params.mask.visible(queries, keys, request, head) for head in heads])
    if segment == "all":
        return seen
    near = exact_pairs(queries, keys, page_size)
    return seen & (near if segment == "exact" else ~near)


def _keys_and_values(
    layer: LayerKV, table: Tensor, low: int, high: int, dtype
) -> tuple[Tensor, Tensor]:
    first, second = (_rows(half, table, low, high, dtype) for half in (layer.key, layer.value))
    return (torch.cat([first, second], -1), first) if layer.latent else (first, second)


def _rows(pages: QuantizedPages, table: Tensor, low: int, high: int, dtype) -> Tensor:
    """Dequantized rows low..high of a request, [kv_heads, high - low, head_dim]."""
    used = table[low // pages.page_size :]
    # A page that is not kept (-1) is outside the segment: any page may stand in for it.
    gather = unchecked(gather_request)
    return gather(pages, used.clamp_min(0), high - low, dtype).transpose(0, 1)
