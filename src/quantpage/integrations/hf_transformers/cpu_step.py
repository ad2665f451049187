"""A decode step on a CPU: linear layers and whole blocks by the compiled core.

``nn.Linear`` of a few tokens is bound by reading its weights, which torch does at a third of the
memory's speed. Every linear layer of an attached model asks the core instead, and a block whose
code is Llama's (Mistral, Qwen 2, Ministral, SmolLM ..) becomes four calls of it: projections with
norm and rotary embedding, the write, attention, and all the rest. Prompts, training and whatever
the core does not know run the model's own code, which is untouched.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from quantpage.cpu_core import find_core
from quantpage.cpu_core.products import (
    MAX_TOKENS,
    Matrix,
    Norm,
    Projection,
    Rotary,
    SecondHalf,
)
from quantpage.integrations.hf_transformers import functions
from quantpage.integrations.hf_transformers.cache import PagedLayer, QuantPageCache
from quantpage.integrations.int8_weights import Int8Linear


def install(model: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Give the model's linear layers and blocks a ``forward`` that asks the core first.

    undo: is given what takes each of them back.
    """
    if find_core() is None:
        return
    for module in model.modules():
        if "forward" in vars(module):
            # Somebody else's (accelerate moves weights there), which ours would pass by.
            continue
        if type(module) in _LINEARS:
            _replace(module, _Linear(module), undo)
        elif _is_llama_block(module):
            _replace(module, _Block(module), undo)


_LINEARS = (nn.Linear, Int8Linear)


def _replace(module: nn.Module, forward: Any, undo: list[Callable[[], None]]) -> None:
    module.forward = forward  # type: ignore[method-assign]
    undo.append(lambda: vars(module).pop("forward", None))


class _Parts:
    """Everything that hangs in a module, to notice that somebody hung something else there."""

    def __init__(self, module: nn.Module) -> None:
        each = list(module.modules())
        self._held = [
            (place, name, part)
            for owner in each
            for place in (owner._modules, owner._parameters, owner._buffers)
            for name, part in place.items()
        ]
        self._hooks = [
            hooks
            for inner in each
            if inner is not module
            for hooks in (inner._forward_hooks, inner._forward_pre_hooks)
        ]

    def same(self) -> bool:
        """Whether all of it is still there."""
        return all(place.get(name) is part for place, name, part in self._held)

    def watched(self) -> bool:
        """Whether a hook waits for a call of some inner module."""
        return any(self._hooks)


def _served_here(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a step of a few tokens, of which nobody wants gradients or a graph."""
    return (
        type(x) is Tensor
        and 0 < x.numel() <= MAX_TOKENS * x.shape[-1]
        and not (torch.is_grad_enabled() and weight.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def matrix_of(module: Any) -> Matrix:
    """What a linear layer multiplies by."""
    return Matrix(module.weight, getattr(module, "scale", None), module.bias)


class _Linear:
    """``forward`` of a linear layer."""

    def __init__(self, module: Any) -> None:
        self._module, self._parts = module, _Parts(module)
        self._matrix = matrix_of(module)
        self._product = Projection([self._matrix])

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        weight = self._matrix.weight
        if (
            _served_here(x, weight)
            and x.shape[-1] == weight.shape[1]
            and self._parts.same()
            and self._product.serves(x.dtype)
        ):
            return self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return type(self._module).forward(self._module, x)


class _Block:
    """``forward`` of a decoder layer like Llama's."""

    def __init__(self, module: Any) -> None:
        self._module, self._parts = module, _Parts(module)
        attention, mlp = module.self_attn, module.mlp
        before, after = module.input_layernorm, module.post_attention_layernorm
        heads = attention.q_proj, attention.k_proj, attention.v_proj
        rest = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self._project = Projection(
            [matrix_of(each) for each in heads], Norm(before.weight, before.variance_epsilon)
        )
        self._finish = SecondHalf(
            *(matrix_of(each) for each in rest), Norm(after.weight, after.variance_epsilon)
        )
        self._weight = before.weight
        self._sizes = [each.out_features // attention.head_dim for each in heads]

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The block's output, [rows, new, width]."""
        pages = self._pages(hidden_states, past_key_values, attention_mask, kwargs)
        if pages is None or position_embeddings is None:
            return type(self._module).forward(
                self._module,
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        attention, sizes = self._module.self_attn, self._sizes
        rows, new, width = hidden_states.shape
        x = hidden_states.reshape(-1, width)
        rotary = _rotary(position_embeddings, rows, sizes[0] + sizes[1])
        mixed = self._project(x, rotary).view(rows * new, -1, attention.head_dim)
        q, k, v = mixed.split_with_sizes(sizes, 1)
        facts = functions.facts_of(attention_mask, getattr(attention, "sliding_window", None))
        params = functions.params_of(attention.scaling, facts.window)
        out = pages.attend_packed(q, k, v, new, params, facts.padding)
        return self._finish(out.view(rows * new, -1), x).view(rows, new, width)

    def _pages(
        self, x: Tensor, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> PagedLayer | None:
        """The layer of the cache; None where the model's own code has to run."""
        module = self._module
        if (
            type(cache) is not QuantPageCache
            or not _served_here(x, self._weight)
            or (mask is not None and mask.ndim != 2)
            or not kwargs.keys() <= _HARMLESS
            or module.training
            or not self._parts.same()
            or self._parts.watched()
        ):
            return None
        layer = cache.layers[module.self_attn.layer_idx]
        ready = type(layer) is PagedLayer and layer.is_initialized and layer.dtype == x.dtype
        served = self._project.serves(x.dtype) and self._finish.serves(x.dtype)
        return layer if ready and served else None


_HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}
"""Arguments that a model may hand to its blocks and that do not change their result."""


def _rotary(embeddings: tuple[Tensor, Tensor], rows: int, heads: int) -> Rotary:
    """cos and sin, which may be the same for all rows, a line a token."""
    cos, sin = embeddings
    if cos.shape[0] != rows:
        cos, sin = (each.expand(rows, -1, -1) for each in embeddings)
    return Rotary(cos.flatten(0, 1).contiguous(), sin.flatten(0, 1).contiguous(), heads)


@lru_cache
def _code(function: Any) -> tuple[Any, ...]:
    """What a function does: its instructions, names and constants other than texts."""
    code = inspect.unwrap(function).__code__
    constants = tuple(each for each in code.co_consts if not isinstance(each, str))
    return code.co_code, code.co_names, code.co_varnames, constants


def _like(module: Any, *models: type) -> bool:
    """Whether a module's forward is word for word one of these.

    Transformers' models are written out in full, one file each; most are copies of Llama's.
    """
    forward = getattr(type(module), "forward", None)
    return forward is not None and _code(forward) in {_code(each.forward) for each in models}


def _is_llama_block(module: Any) -> bool:
    """Whether a module computes what Llama's decoder layer does, every part of it."""
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if attention is None or mlp is None or not _like(module, llama.LlamaDecoderLayer):
        return False
    norms = module.input_layernorm, module.post_attention_layernorm
    if not (
        _like(attention, llama.LlamaAttention, MistralAttention, Qwen2Attention)
        and _like(mlp, llama.LlamaMLP)
        and all(_like(each, llama.LlamaRMSNorm) for each in norms)
        and isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))
        and attention.is_causal
    ):
        return False
    # The rotary embedding is a function of the module's file, half-split or interleaved.
    names = vars(inspect.getmodule(type(attention)))
    turns = [names.get(name) for name in ("apply_rotary_pos_emb", "rotate_half")]
    llamas = [llama.apply_rotary_pos_emb, llama.rotate_half]
    if not all(
        turn and _code(turn) == _code(other) for turn, other in zip(turns, llamas, strict=True)
    ):
        return False
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return all(
        type(each) in _LINEARS for each in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
