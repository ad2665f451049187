"""A model's own attention and mask, which run wherever its pages do not.

While a model is attached its configuration names our functions. Whatever they cannot serve from
pages (a forward without a cache, training, gradients, masks and arguments that no kernel knows)
goes to the functions that the configuration named before, so that the answer is the model's own.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_INTERNAL = "_attn_implementation_internal"

_before: dict[int, tuple[Any, str]] = {}
"""Of each attached configuration, by its id: itself, and what it named before."""


def remember(config: Any, name: str | None) -> Callable[[], None]:
    """Note what a configuration named; returns what forgets it again."""
    _before[id(config)] = config, name or "eager"

    def forget() -> None:
        del _before[id(config)]

    return forget


def use_attention(configs: Iterable[Any], name: str, undo: list[Any]) -> None:
    """Name functions of ours in configurations, remembering what was there."""
    for config in configs:
        before = config._attn_implementation_internal
        if before == name:
            # Copied from a configuration that was attached.
            before = own_name(config)
        undo.append(remember(config, before))
        undo.append(partial(setattr, config, "_attn_implementation_internal", before))
        config._attn_implementation_internal = name


def refuse_other_attention(configs: Iterable[Any], name: str) -> None:
    """ValueError where somebody named another attention than ours after ``use_attention``."""
    for config in configs:
        if config._attn_implementation_internal != name:
            raise ValueError(
                f"attn_implementation: expected {name!r} while a model is attached, as another "
                f"would read its pages as dense tensors, got "
                f"{config._attn_implementation_internal!r}; detach() first"
            )


def keep_attention(
    module: Any, configs: Sequence[Any], name: str, undo: list[Callable[[], None]]
) -> None:
    """Let ``set_attn_implementation`` change encoders alone, and nothing where it would more."""
    change = module.set_attn_implementation

    @wraps(change)
    def checked(*args: Any, **kwargs: Any) -> None:
        every = [*configs, *(getattr(each, "config", None) for each in module.modules())]
        before = [(each, getattr(each, _INTERNAL)) for each in every if hasattr(each, _INTERNAL)]
        change(*args, **kwargs)
        try:
            refuse_other_attention(configs, name)
        except ValueError:
            for each, named in before:
                setattr(each, _INTERNAL, named)
            raise

    module.set_attn_implementation = checked
    undo.append(partial(vars(module).pop, "set_attn_implementation", None))


def is_attached(config: Any) -> bool:
    """Whether a configuration names functions of ours, for a model that is attached."""
    return id(config) in _before


def own_name(config: Any) -> str:
    """What an attached configuration named before."""
    return _before[id(config)][1] if is_attached(config) else "sdpa"


def own_mask(config: Any, arguments: dict[str, Any]) -> Tensor | None:
    """The mask that the model's own attention reads."""
    make = ALL_MASK_ATTENTION_FUNCTIONS[own_name(config)]
    return make(config=config, **arguments)


def own_attention(
    module: nn.Module,
    query: Tensor,
    key_value: Sequence[Tensor],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention of dense tensors."""
    name = own_name(getattr(module, "config", None))
    file = vars(sys.modules[type(module).__module__])
    eager = file.get("eager_attention_forward")
    if name == "eager" or kwargs.get("softcap") is not None:
        function: Any = eager or sdpa_attention_forward
    else:
        # Code on the hub may bring its own table under Transformers' name.
        table = file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        function = table.get_interface(name, eager)
    if function is eager and attention_mask is not None and attention_mask.dtype == torch.bool:
        # Eager attention adds its mask to the scores: of a bool it would add 1.
        hidden = torch.finfo(query.dtype).min
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attention_mask = torch.where(attention_mask, zero, hidden)
    return function(module, query, *key_value, attention_mask, **kwargs)


def causal_without_mask(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether the model's own attention is causal where it is given no mask at all.

    is_causal: what the model passes; None: what its module says.
    """
    if own_name(getattr(module, "config", None)) == "eager":
        return False
    return getattr(module, "is_causal", True) if is_causal is None else is_causal
