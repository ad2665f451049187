"""The attention function and the mask function that a Transformers model is given.

Transformers asks the mask function once a forward (per kind of layer) and passes its answer to
every layer's attention function. Causality, windows and chunks are the kernel's job, so ours
answers with the two-dimensional padding mask and says, as an attribute of it, which rule the mask
was asked for. Where a model lays anything else over that rule it answers with the model's own mask,
and attention is the model's own over the dequantized cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    sliding_window_overlay,
)

from quantpage.integrations.hf_transformers.hooks.own import (
    causal_without_mask,
    own_attention,
    own_mask,
)
from quantpage.integrations.hf_transformers.pages.lazy import LazyKV, layer_behind
from quantpage.masks import CausalMask, FullMask, Mask
from quantpage.ops.attend import AttendParams

NAME = "quantpage"
"""What ``model.config._attn_implementation`` says while a model is attached."""

_UNDERSTOOD = {
    "cache",
    "cache_position",
    "dropout",
    "is_causal",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "return_shared_kv_states",
    "s_aux",
    "sliding_window",
    "softcap",
    # Of generate(stop_strings=...), which some versions hand on to every forward.
    "tokenizer",
    "use_cache",
}
"""Arguments of attention that pages serve, or that do not change its result."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Who sees whom, as kernels know it: positions alone, without padding."""

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    """Queries see their own chunk of so many tokens alone."""

    def mask(self, tokens: int) -> Mask:
        """The rule as a mask, for requests of at most ``tokens`` tokens."""
        if not self.causal:
            return FullMask()
        if self.chunk is None or tokens <= self.chunk:
            return CausalMask(window=self.window)
        return _chunks(self.chunk, 1 << (-(-tokens // self.chunk) - 1).bit_length())


@dataclass(frozen=True, slots=True, eq=False)
class MaskFacts:
    """What a forward's mask is, told by the mask function to the attention function."""

    rule: Rule | None
    """None: one that only the model's own mask states."""
    padding: Tensor | None
    """[rows, tokens] bool, False for padding; None: no padding."""
    arguments: dict[str, Any] | None = None
    """Of the mask function; None: the model rebuilt the mask, and nobody knows them."""
    config: Any = None
    _made: list[Tensor | None] = field(default_factory=list)

    @property
    def window(self) -> int | None:
        """Keys that a query sees at most; None: all before it."""
        return None if self.rule is None else self.rule.window

    def own(self) -> Tensor | None:
        """The model's own mask, made when the first layer asks."""
        if not self._made:
            assert self.arguments is not None
            self._made.append(own_mask(self.config, self.arguments))
        return self._made[0]


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """[rows, tokens] bool with ``MaskFacts`` attached, or the model's own mask with them."""
    offset = kwargs.get("kv_offset", 0)
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": allow_is_causal_skip,
        "device": device,
        **kwargs,
    }
    padding = padding_of(attention_mask, offset + kv_length)
    rule = rule_of(kwargs.get("mask_function", causal_mask_function))
    facts = MaskFacts(rule, padding, arguments, config)
    if rule is None or not allow_is_causal_skip:
        # The model goes on to work with the mask.
        answer = facts.own()
        if answer is None:
            return None
    elif padding is not None:
        answer = padding
    else:
        answer = torch.ones(batch_size, 1, dtype=torch.bool, device=device).expand(-1, kv_length)
    answer.quantpage = facts  # type: ignore[attr-defined]
    return answer


def padding_of(attention_mask: Tensor | None, total: int) -> Tensor | None:
    """[rows, total] bool of a mask with two dimensions, False for padding; None: no padding."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, :total].to(torch.bool)
    # One that is too short is kept: rows say what they expected.
    return None if padding.shape[1] == total and bool(padding.all()) else padding


def rule_of(function: Callable[..., Any]) -> Rule | None:
    """What a mask function of Transformers says, where positions alone decide."""
    if function is causal_mask_function:
        return Rule()
    if function is bidirectional_mask_function:
        return Rule(causal=False)
    code = getattr(function, "__code__", None)
    if code is None or not code.co_freevars:
        return None
    rule, causal = Rule(causal=False), False
    for part in _held(function)["mask_functions"] if code in _AND else [function]:
        inner = getattr(part, "__code__", None)
        if part is causal_mask_function:
            causal = True
        elif inner is _WINDOW:
            rule = replace(rule, window=int(_held(part)["sliding_window"]))
        elif inner is _CHUNK:
            rule = replace(rule, chunk=int(_held(part)["chunk_size"]))
        else:
            return None
    return replace(rule, causal=True) if causal else None


def _held(function: Any) -> dict[str, Any]:
    """What an inner function holds of the one that made it."""
    names, cells = function.__code__.co_freevars, function.__closure__
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


_AND = {and_masks(causal_mask_function).__code__}
_WINDOW = sliding_window_overlay(1).__code__
_CHUNK = chunked_overlay(1, torch.zeros(1, dtype=torch.int64, device="cpu")).__code__


@lru_cache(maxsize=16)
def _chunks(chunk: int, count: int) -> Mask:
    from quantpage.masks import causal_document

    return causal_document([chunk] * count)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of [rows, heads, tokens, head_dim] queries; returns [rows, tokens, heads, ..].

    Reads the pages when ``key`` and ``value`` stand for them and the mask is one that the
    kernels know; otherwise the model's own attention runs over the dequantized tensors.
    """
    facts = _facts(module, attention_mask, kwargs)
    own_kwargs = {"scaling": scaling, "dropout": dropout, **kwargs}
    layer = layer_behind(key, value)
    if layer is None:
        # Nothing of ours: the model runs as if it were not attached.
        dense = [each.dequantized() if isinstance(each, LazyKV) else each for each in (key, value)]
        mask = _own(facts, attention_mask, query, key)
        return own_attention(module, query, dense, mask, **own_kwargs)
    why = _why_dense(facts, dropout, kwargs)
    out = None
    if why is None:
        assert facts is not None and facts.rule is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        params = AttendParams(scale, facts.rule.mask(layer.length), kwargs.get("softcap"))
        if kwargs.get("s_aux") is not None:
            params = replace(params, sinks=kwargs["s_aux"])
        with torch.no_grad():
            out = layer.attend(query, params, facts.padding)
        if not _differentiable(query, key, value):
            return out, None
        layer.refuse_gradients()
    else:
        layer.serve_densely(why)
    dense = [each.dequantized() if isinstance(each, LazyKV) else each for each in (key, value)]
    mask = _own(facts, attention_mask, query, key)
    dense_out, weights = own_attention(module, query, dense, mask, **own_kwargs)
    if out is None:
        return dense_out, weights
    # The pages' answer with the gradient of the model's own attention over what they hold.
    return out + (dense_out - dense_out.detach()), None


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _why_dense(facts: MaskFacts | None, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why pages cannot serve a call; None: they can."""
    if facts is None or facts.rule is None:
        return "its mask is more than causality, a window or chunks"
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _UNDERSTOOD)
    if unknown:
        return f"its attention takes {', '.join(unknown)}"
    return "it has dropout" if dropout else None


@lru_cache(maxsize=256)
def params_of(scale: float, window: int | None) -> AttendParams:
    """Made once: a decode step asks for the same in every layer."""
    return AttendParams(softmax_scale=scale, mask=CausalMask(window=window))


def facts_of(attention_mask: Tensor | None, sliding_window: int | None) -> MaskFacts:
    """What the mask function said about a mask; ``sliding_window``: the model's own word."""
    found = getattr(attention_mask, "quantpage", None)
    if found is not None:
        return found
    # The model rebuilt the mask (a copy, a slice): its values are padding, its window an argument.
    return MaskFacts(Rule(window=sliding_window), attention_mask)


def _facts(
    module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> MaskFacts | None:
    """``facts_of``, also where there is no mask; None: a mask that the user or the model made."""
    if attention_mask is None:
        return MaskFacts(Rule(causal_without_mask(module, kwargs.get("is_causal"))), None)
    facts: MaskFacts | None = getattr(attention_mask, "quantpage", None)
    if facts is not None:
        return _flagged(facts, module, kwargs)
    if attention_mask.ndim != 2:
        return None
    rule = Rule(getattr(module, "is_causal", True), kwargs.get("sliding_window"))
    return MaskFacts(rule, attention_mask.to(torch.bool))


def _flagged(facts: MaskFacts, module: nn.Module, kwargs: dict[str, Any]) -> MaskFacts:
    """The facts for a module that was made to see everything by a flag of its own (LLM2Vec), which
    counts where the model's own attention is given no mask, and there alone."""
    causal = facts.rule == Rule() and facts.arguments is not None
    if not causal or getattr(module, "is_causal", True) or facts.own() is not None:
        return facts
    return replace(facts, rule=Rule(causal_without_mask(module, kwargs.get("is_causal"))))


def _own(
    facts: MaskFacts | None, attention_mask: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """The mask that the model's own attention is to read."""
    if facts is None or facts.rule is None or attention_mask is None:
        return attention_mask
    if facts.arguments is not None:
        return facts.own()
    new, total = query.shape[2], key.shape[2]
    positions = torch.arange(total - new, total, device=query.device)
    seen = facts.rule.mask(total).materialize(positions, total)[None, None]
    return seen if facts.padding is None else seen & facts.padding[:, None, None, -total:]


def register() -> None:
    """Make Transformers know both functions by ``NAME``; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
