"""The attention function and the mask function that a Transformers model is given.

Transformers asks the mask function once a forward (per kind of layer) and passes its answer to
every layer's attention function. Causality and windows are the kernel's job, so ours answers with
the two-dimensional padding mask and, as an attribute of it, the window that the mask was asked
for. Where a model lays anything else over the causal rule, it answers with the full mask of
Transformers and attention runs densely over the dequantized cache.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quantpage.errors import UnsupportedModel
from quantpage.integrations.hf_transformers.lazy import LazyKV
from quantpage.masks import CausalMask, FullMask, Mask
from quantpage.ops.attend import AttendParams

NAME = "quantpage"
"""What ``model.config._attn_implementation`` says while a model is attached."""

_FOREIGN = {"indices", "block_indices", "sinks"}
"""Arguments of models that choose their keys by other means than a mask."""


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """What a forward's mask is, told by the mask function to the attention function."""

    window: int | None
    padding: Tensor | None
    """[rows, tokens] bool, False for padding; None: no padding."""


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """[rows, tokens] bool with ``MaskFacts`` attached, or Transformers' own 4-D mask."""
    if not allow_is_causal_skip:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            device=device,
            **kwargs,
        )
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, :kv_length].to(torch.bool)
        if padding.shape[1] < kv_length:
            missing = kv_length - padding.shape[1]
            padding = nn.functional.pad(padding, (0, missing), value=True)
        if bool(padding.all()):
            padding = None
    answer = padding
    if answer is None:
        answer = torch.ones(batch_size, 1, dtype=torch.bool, device=device).expand(-1, kv_length)
    answer.quantpage = MaskFacts(local_size, padding)  # type: ignore[attr-defined]
    return answer


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of [rows, heads, tokens, head_dim] queries; returns [rows, tokens, heads, ..].

    Reads the pages when ``key`` and ``value`` stand for them and the mask is one that the
    kernels know; otherwise dense attention over the dequantized tensors.
    """
    lazy = isinstance(key, LazyKV) and isinstance(value, LazyKV)
    known = attention_mask is None or attention_mask.ndim == 2
    plain = kwargs.get("position_bias") is None and _FOREIGN.isdisjoint(kwargs)
    if not (lazy and known and plain):
        return _dense(module, query, key, value, attention_mask, scaling, dropout, kwargs)
    facts = facts_of(attention_mask, kwargs.get("sliding_window"))
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    params = params_of(scale, facts.window, causal, kwargs.get("softcap"))
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        params = replace(params, sinks=sinks)
    assert isinstance(key, LazyKV)
    return key.layer.attend(query, params, facts.padding), None


@lru_cache(maxsize=256)
def params_of(
    scale: float, window: int | None, causal: bool = True, softcap: float | None = None
) -> AttendParams:
    """Made once: a decode step asks for the same in every layer."""
    mask: Mask = CausalMask(window=window) if causal else FullMask()
    return AttendParams(softmax_scale=scale, mask=mask, softcap=softcap)


def facts_of(attention_mask: Tensor | None, sliding_window: int | None) -> MaskFacts:
    """What the mask function said about a mask; ``sliding_window``: the model's own word."""
    found = getattr(attention_mask, "quantpage", None)
    if found is not None:
        return found
    # The model rebuilt the mask (a copy, a slice): its values are padding, its window an argument.
    return MaskFacts(sliding_window, attention_mask)


def _dense(module, query, key, value, attention_mask, scaling, dropout, kwargs):
    """Transformers' own attention over dense tensors, for what the pages cannot serve."""
    key = key.dequantized() if isinstance(key, LazyKV) else key
    value = value.dequantized() if isinstance(value, LazyKV) else value
    causal = kwargs.pop("is_causal", None)
    if causal is None:
        causal = getattr(module, "is_causal", True)
    window = kwargs.pop("sliding_window", None)
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if attention_mask is None or attention_mask.ndim == 2:
        facts = facts_of(attention_mask, window)
        new, total = query.shape[2], key.shape[2]
        rule: Mask = CausalMask(window=facts.window) if causal else FullMask()
        positions = torch.arange(total - new, total, device=query.device)
        attention_mask = rule.materialize(positions, total)[None, None]
        if facts.padding is not None:
            attention_mask = attention_mask & facts.padding[:, None, None, -total:]
    if softcap is not None or sinks is not None:
        if kwargs.get("position_bias") is not None:
            raise UnsupportedModel(
                f"{type(module).__name__}: expected a position bias, or softcap and sinks, "
                "not both; got both"
            )
        return _dense_with_extras(
            module, query, key, value, attention_mask, scaling, softcap, sinks
        )
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=False,
        **kwargs,
    )


def _dense_with_extras(module, query, key, value, mask, scaling, softcap, sinks):
    """Softcap and sink logits, which SDPA has no argument for."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.mT).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([hidden, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = hidden.softmax(-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make Transformers know both functions by ``NAME``; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
