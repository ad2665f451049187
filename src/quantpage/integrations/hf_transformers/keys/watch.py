"""Looking at what a model's attention is given, in its own unquantized forward.

An attention function that looks on stands in for the model's own and calls it, or answers for a
layer: queries, keys and values after norms and RoPE, whatever the architecture. No name of a
projection has to be known, and offloaded or sharded weights serve as always.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import PreTrainedModel

from quantpage.integrations.hf_transformers.hooks import functions
from quantpage.integrations.hf_transformers.hooks.own import use_attention
from quantpage.integrations.hf_transformers.hooks.supply import attention_configs
from quantpage.integrations.hf_transformers.loading.model import text_config
from quantpage.integrations.hf_transformers.modules.coverage import caching_modules, uses_interface

NAME = "quantpage_watch"
"""What ``model.config._attn_implementation`` says while a model is watched."""

Attend = Callable[[Tensor, Tensor], Tensor]
"""Keys and values -> what the layer's attention answers with them in place of its own,
[rows, tokens, q_heads, value_head_dim]."""

Look = Callable[[int, Tensor, Tensor, Tensor, Attend], Tensor | None]
"""Told of a layer's call: its index; query, key and value as [rows, heads, tokens, head_dim]; and
what asks the same attention again. What it returns is the layer's answer; None: the model's own."""


@contextmanager
def watched(model: PreTrainedModel, look: Look) -> Iterator[None]:
    """``model`` in evaluation mode, ``look`` told of every call of attention; then as before.

    Layers whose attention does not go through Transformers' interface are not seen.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        def attend(keys: Tensor, values: Tensor) -> Tensor:
            return functions.attention_function(module, query, keys, values, *args, **kwargs)[0]

        index = getattr(module, "layer_idx", None)
        answer = None if index is None else look(index, query, key, value, attend)
        if answer is not None:
            return answer, None
        return functions.attention_function(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, functions.mask_function)
    caching = caching_modules(model, type(text_config(model.config)))
    modules = [module for each in caching.values() for module in each if uses_interface(module)]
    training = [module for module in model.modules() if module.training]
    undo: list[Any] = []
    try:
        use_attention(attention_configs(model, modules), NAME, undo)
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
        while undo:
            undo.pop()()
