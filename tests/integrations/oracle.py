"""Dense attention that sees what a quantized cache would hold: the integration tests' control.

Keys and values stay unquantized in a DynamicCache and are round-tripped at every call; the exact
pages' rule is applied to the matrix of all pairs. It shares formats/quantize and
formats/feedback with the product and nothing else: no page, no plan, no tile.
"""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from quantpage.formats import KVFormat, dequantize, quantize, rotate
from quantpage.formats.feedback import quantize_with_feedback

NAME = "oracle"
_state: dict = {}


def _round_trip(x, spec, key_map=None):
    """[rows, heads, tokens, channels]."""
    if key_map is not None:
        x = torch.stack([key_map.keys(row.transpose(0, 1)).transpose(0, 1) for row in x])
    turned = rotate(x) if spec.rotation == "hadamard" else x
    if key_map is not None and key_map.feedback is not None:
        rows = turned.transpose(1, 2).flatten(0, 1)
        codes = quantize_with_feedback(rows, spec, key_map.feedback)
        seen = dequantize(*codes, spec, torch.float64).unflatten(0, (len(x), -1)).transpose(1, 2)
    else:
        seen = dequantize(*quantize(turned, spec), spec, torch.float64)
    seen = rotate(seen) if spec.rotation == "hadamard" else seen
    if key_map is not None:
        seen = torch.stack([key_map.restored(row.transpose(0, 1)).transpose(0, 1) for row in seen])
    return seen


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    kv_format: KVFormat = _state["format"]
    page = _state["page_size"]
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    new, total = query.shape[2], key.shape[2]
    positions = torch.arange(total - new, total)
    pages = torch.arange(total) // page
    own = positions[:, None] // page
    near = (pages[None] == 0) | (pages[None] == own) | (pages[None] == own - 1)
    if kv_format.exact_pages is None:
        near = torch.zeros_like(near)
    half = [x.repeat_interleave(group, 1) for x in (key, value)]
    key_map = _state["key_maps"].get(module.layer_idx)
    coded = [
        _round_trip(x, spec, mapped).repeat_interleave(group, 1)
        for x, spec, mapped in ((key, kv_format.key, key_map), (value, kv_format.value, None))
    ]
    scores = torch.where(near, query @ half[0].mT, query @ coded[0].mT) * scaling
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attention_mask[:, :, :, :total], -torch.inf)
    if sinks is not None:
        sink = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).nan_to_num(0.0)
    out = torch.where(near, weights, 0.0) @ half[1] + torch.where(near, 0.0, weights) @ coded[1]
    return out.transpose(1, 2).to(_state["dtype"]), None


def _mask(*args, **kwargs):
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


@contextmanager
def oracle(model, kv_format: KVFormat, page_size: int, key_maps=None):
    """The model with dense, fake-quantized attention in float64; key_maps: by layer."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    _state.update(format=kv_format, page_size=page_size, dtype=model.dtype, key_maps=key_maps or {})
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
