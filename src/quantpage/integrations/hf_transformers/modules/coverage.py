"""Which layers of an attached model read quantized pages, and why the others do not.

What a model's code will do with a cache is read from its modules before anything runs, and what it
did is noted when a layer's pages are turned into dense tensors. Neither is silent.
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn
from weakref import ref

from torch import nn
from transformers import PreTrainedConfig

from quantpage.errors import PartlyPaged, UnsupportedModel
from quantpage.integrations.hf_transformers.modules.latent import has_latent_rows, why_expanded


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of how many layers the attention reads pages."""

    layers: int
    """Of the decoder."""
    paged: int
    """Layers whose attention reads quantized pages as they are."""
    latent: int
    """Of these, layers that keep one latent row a token for all heads (MLA) and attend to it."""
    dense: tuple[tuple[str, int], ...]
    """(why, layers) of those that keep quantized pages and attend to what they hold as dense
    tensors: right, without the gain in speed, and without pages that are kept exact."""
    own_state: int
    """Layers that keep a state of their own, unquantized: recurrent states, convolutions, the
    encoder's keys of a cross-attention."""

    @property
    def whole(self) -> bool:
        """Whether every layer that keeps anything reads pages."""
        return not self.dense and not self.own_state

    def __str__(self) -> str:
        said = [f"{self.paged} of {self.layers} layers read pages"]
        if self.latent:
            said.append(f"{self.latent} of them latent rows, one a token for all heads (MLA)")
        for why, count in self.dense:
            said.append(f"{count} are attended to densely because {why}")
        if self.own_state:
            said.append(f"{self.own_state} with a state of their own, unquantized")
        return "; ".join(said)


@dataclass(slots=True)
class Ledger:
    """What is known of each layer so far; shared by all caches of an attachment."""

    model: str = ""
    layers: int = 0
    first: "ref[nn.Module] | None" = None
    """A module that puts keys into the cache, by which the model is known, in whatever wrapper."""
    paged: set[int] = field(default_factory=set)
    own_state: set[int] = field(default_factory=set)
    beside: set[int] = field(default_factory=set)
    """Of the layers with a state of their own, those that have keys and values as well."""
    latent: set[int] = field(default_factory=set)
    """Layers whose pages hold latent rows."""
    dense: dict[int, str] = field(default_factory=dict)

    def is_of(self, other: "Ledger") -> bool:
        """Whether both are of one model."""
        return None not in (self.first, other.first) and self.first == other.first

    def coverage(self) -> Coverage:
        """As a record."""
        return Coverage(
            layers=self.layers,
            paged=len(self.paged - self.dense.keys()),
            latent=len(self.latent - self.dense.keys()),
            dense=tuple(Counter(self.dense.values()).items()),
            own_state=len(self.own_state - (self.paged - self.beside)),
        )

    def keep(self, layer: int) -> None:
        """Note that a layer got keys and values, also where no module's number said so."""
        self.paged.add(layer)

    def serve_densely(self, layer: int, why: str) -> None:
        """Note that a layer's pages were made dense; the first time for a reason, say so."""
        if layer in self.dense:
            return
        said = why in self.dense.values()
        self.dense[layer] = why
        if not said:
            warnings.warn(
                f"{self.model}: layer {layer} attends densely over its quantized pages because "
                f"{why}; right, but not faster for being quantized (Attached.coverage counts)",
                PartlyPaged,
                stacklevel=2,
            )

    def announce(self) -> None:
        """Say what is known before anything runs, where not every layer reads pages."""
        found = self.coverage()
        if not found.whole:
            warnings.warn(f"{self.model}: {found}", PartlyPaged, stacklevel=3)


def caching_modules(model: nn.Module, kind: type) -> dict[int, list[nn.Module]]:
    """The modules that put keys and values into a cache, by the number of their layer.

    kind: of the decoder's configuration; encoders in the same model have others.
    """
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        config = getattr(module, "config", None)
        # Some modules keep a number under this name (Idefics).
        other = (
            isinstance(config, PreTrainedConfig)
            and type(config.get_text_config(decoder=True)) is not kind
        )
        if isinstance(index, int) and not other and _updates_cache(type(module).forward):
            found.setdefault(index, []).append(module)
    return found


def refuse_own_cache(model: nn.Module) -> None:
    """UnsupportedModel for a class that Transformers itself gives no cache of its usual kind."""
    supports: Any = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        raise UnsupportedModel(
            f"{_kind(model)}: expected a model that takes Transformers' DynamicCache, "
            f"got {type(model).__name__}, which has a kind of its own"
        )


def refuse_pageless(model: nn.Module) -> NoReturn:
    """Raise UnsupportedModel for a model of which no layer can have pages."""
    raise UnsupportedModel(
        f"{_kind(model)}: expected layers that cache keys and values, found none in "
        f"{type(model).__name__}: there is nothing to keep in pages"
    )


def _kind(model: Any) -> str:
    return model.config.model_type


def refuse_look_ahead(model: nn.Module) -> None:
    """UnsupportedModel for a decoder that is made to see what follows: keys of a token then depend
    on later ones, so that no beginning can be kept, and no prompt be cut."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    told = []
    if False in (getattr(each, "is_causal", None) for each in (config, text)):
        told.append("is_causal=False")
    both = getattr(text, "use_bidirectional_attention", None)
    if both is True or both == "all":
        told.append(f"use_bidirectional_attention={both}")
    if told:
        raise UnsupportedModel(
            f"{_kind(model)}: expected tokens that see none behind them, as a page is known by the "
            f"tokens up to its end; got {', '.join(told)} in its configuration"
        )


def why_dense(modules: Iterable[nn.Module]) -> str | None:
    """Why a layer's attention will not read pages, as far as its code says; None: it may."""
    for module in modules:
        if not uses_interface(module):
            return "its attention is its own code"
        if has_latent_rows(module):
            return why_expanded(module)
    return None


def crosses(modules: Iterable[nn.Module]) -> bool:
    """Whether a layer attends to an encoder's tokens alone, whose keys it caches once (Mllama)."""
    return all(
        getattr(each, "is_cross_attention", False)
        or "cross_attention_states" in inspect.signature(type(each).forward).parameters
        for each in modules
    )


@lru_cache
def _names(forward: Any) -> frozenset[str]:
    code = inspect.unwrap(forward).__code__
    return frozenset((*code.co_names, *code.co_varnames))


def _updates_cache(forward: Any) -> bool:
    names = _names(forward)
    caches = {"cache", "past_key_values", "past_key_value", "layer_past", "curr_past_key_values"}
    return "update" in names and bool(caches & names)


def uses_interface(module: nn.Module) -> bool:
    """Whether a module's attention is a function that its configuration names."""
    return "get_interface" in _names(type(module).forward)
