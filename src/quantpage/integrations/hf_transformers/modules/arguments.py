"""How a cache is passed to Transformers' modules: the argument's name, by signature.

It is ``past_key_values`` up to Transformers 5.23 and ``cache`` from 5.24 on.
"""

import inspect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

CACHE_NAMES = ("cache", "past_key_values")
"""Newest first."""


@lru_cache
def _names(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's forward arguments, in order."""
    return _names(type(module).forward)


def cache_argument(module: nn.Module) -> str | None:
    """What this module's forward calls its cache; None where it takes none."""
    names = parameters(module)
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_name(module: nn.Module) -> str:
    """What a cache is called that this module is given, or hands on among what it does not name."""
    usual = _names(GenerationMixin.prepare_inputs_for_generation)
    return cache_argument(module) or next(name for name in CACHE_NAMES if name in usual)


def cache_as(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as the argument of a module's forward."""
    return {cache_name(module): cache}


def take_cache(arguments: dict[str, Any]) -> Any:
    """The cache among arguments, taken out under whatever name; ValueError for two of them."""
    found = [arguments.pop(name, None) for name in CACHE_NAMES]
    given = [each for each in found if each is not None]
    if len(given) == 2 and given[0] is not given[1]:
        raise ValueError("past_key_values: expected one cache, got another one as `cache`")
    return given[0] if given else None


def caches_in(output: Any) -> list[Any]:
    """Every cache among a model's outputs."""
    values = output.values() if hasattr(output, "values") else output
    if isinstance(output, Tensor) or not isinstance(values, Iterable):
        return []
    return [each for each in values if hasattr(each, "get_seq_length")]
