"""Which modules of Transformers compute what Llama's do, and how one is given another forward.

Its models are written out in full, a file each, and most are copies: a module whose forward is
word for word Llama's is Llama's, whatever it is called.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from quantpage.integrations.int8_weights import Int8Linear

LINEARS = (nn.Linear, Int8Linear)
"""Layers that the core multiplies."""

_ATTENTION = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention)
_MODELS = (llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model)


def is_linear(module: Any) -> bool:
    """Whether a module multiplies by numbers in memory: its class alone does not tell.

    Libraries that quantize weights (torchao) hang tensors of their own classes in ``nn.Linear``.
    """
    if type(module) not in LINEARS:
        return False
    parts = (module.weight, module.bias, getattr(module, "scale", None))
    return all(
        type(each) in (Tensor, nn.Parameter) and each.layout == torch.strided and each.data_ptr()
        for each in parts
        if each is not None
    )


@lru_cache
def code_of(function: Any) -> tuple[Any, ...]:
    """What a function does: its instructions, names and constants other than texts."""
    code = inspect.unwrap(function).__code__
    constants = tuple(each for each in code.co_consts if not isinstance(each, str))
    return code.co_code, code.co_names, code.co_varnames, constants


def _like(module: Any, *models: Any) -> bool:
    """Whether a module's forward is word for word one of these."""
    forward = getattr(type(module), "forward", None)
    return forward is not None and code_of(forward) in {code_of(each.forward) for each in models}


def is_llama_block(module: Any) -> bool:
    """Whether a module computes what Llama's decoder layer does, every part of it."""
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if attention is None or mlp is None or not _like(module, llama.LlamaDecoderLayer):
        return False
    norms = module.input_layernorm, module.post_attention_layernorm
    if not (
        _like(attention, *_ATTENTION)
        and _like(mlp, llama.LlamaMLP)
        and all(is_llama_norm(each) for each in norms)
        and isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))
        and attention.is_causal
    ):
        return False
    # A forward calls it by a name of its file, where it may be half-split (ours) or interleaved.
    file = inspect.getmodule(type(attention))
    if file is None or not llama_rotation(vars(file)):
        return False
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return all(is_linear(each) for each in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj))


def llama_rotation(file: Mapping[str, Any]) -> bool:
    """Whether the names of a model's file hold Llama's rotary embedding, half-split."""
    turns = [file.get(name) for name in ("apply_rotary_pos_emb", "rotate_half")]
    llamas = [llama.apply_rotary_pos_emb, llama.rotate_half]
    return all(
        turn and code_of(turn) == code_of(other) for turn, other in zip(turns, llamas, strict=True)
    )


def is_llama_model(module: Any) -> bool:
    """Whether a module runs its blocks one after the other and does nothing between them."""
    return _like(module, *_MODELS) and all(is_llama_block(each) for each in module.layers)


def is_llama_norm(module: Any) -> bool:
    """Whether a module is Llama's RMS norm."""
    return _like(module, llama.LlamaRMSNorm)


def is_still_rotary(module: Any) -> bool:
    """Whether a module's angles are its frequencies times the positions, at any length."""
    kind = getattr(module, "rope_type", None)
    return (
        _like(module, llama.LlamaRotaryEmbedding)
        and isinstance(kind, str)
        and "dynamic" not in kind
        and kind != "longrope"
    )


def window_of(attention: Any) -> int | None:
    """Keys that a block's query sees, itself included; None: all before it."""
    if _like(attention, mistral.MistralAttention):
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)


def replace_forward(module: nn.Module, forward: Any, undo: list[Callable[[], None]]) -> None:
    """Hang ``forward`` in a module that has its class's; undo: is given what takes it off."""
    module.forward = forward  # type: ignore[method-assign]
    undo.append(lambda: vars(module).pop("forward", None))
