"""What `capacity` and `formats` count: the cache of a model folder, of a config.json, or of a few
numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from quantpage.cache import CacheLayout
from quantpage.cache.sizes import LayerPlan, heads_each
from quantpage.formats.per_layer import LayerFormats


@dataclass(frozen=True, slots=True)
class Counted:
    """A cache to count, on one of ``tp`` devices."""

    about: str
    """In words: layers, heads, windows."""
    plans: Callable[[LayerFormats, int], list[LayerPlan]]
    """(formats, page_size) -> the pages of every layer that has some."""
    head_dim: int
    """Channels of a key of the first layer."""
    states: dict[str, int] = field(default_factory=dict)
    """Layer type -> bytes of a request that are no keys and values."""
    config: Any = None
    """Of Transformers; None: the cache was told in numbers."""

    @property
    def state_bytes(self) -> int:
        """Bytes of a request that are no keys and values, however long it is."""
        return sum(self.states.values())


def read_counted(
    model: str | None, layers: int | None, kv_heads: int | None, head_dim: int | None, tp: int
) -> Counted:
    """The cache that the flags tell of; ValueError for too few of them, or for both kinds."""
    numbers = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
    if model is None:
        missing = [name for name, value in numbers.items() if value is None]
        if missing or layers is None or kv_heads is None or head_dim is None:
            raise ValueError(
                "model: expected --model, or all of --layers, --kv-heads and --head-dim; "
                f"got no {', '.join(missing)}"
            )
        return _of_numbers(layers, kv_heads, head_dim, tp)
    given = [name for name, value in numbers.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]}: expected no number beside --model, which says it")
    return _of_model(model, tp)


def _of_numbers(layers: int, kv_heads: int, head_dim: int, tp: int) -> Counted:
    own = heads_each(kv_heads, tp)

    def plans(formats: LayerFormats, page_size: int) -> list[LayerPlan]:
        return [
            LayerPlan(CacheLayout(own, head_dim, each, page_size, torch.bfloat16))
            for each in formats.of_layers(layers)
        ]

    return Counted(_in_words(plans), plans, head_dim)


def _of_model(model: str, tp: int) -> Counted:
    from quantpage.integrations.hf_transformers.loading.model import load_config
    from quantpage.integrations.hf_transformers.sizes import cache_shape

    config = load_config(model)
    shape = cache_shape(config, tp)
    head_dim = next(iter(shape.paged.values())).head_dim
    return Counted(_in_words(shape.layers), shape.layers, head_dim, shape.states, config)


def _in_words(plans: Callable[[LayerFormats, int], list[LayerPlan]]) -> str:
    """'30 layers of 3 kv_heads, head_dim 64'; kinds of layers one after the other."""
    counts: dict[str, int] = {}
    for each in plans(LayerFormats.parse("none"), 64):
        layout, reach = each.layout, each.reach
        width = f"head_dim {layout.head_dim}"
        if layout.v_dim != layout.head_dim:
            width = f"{layout.head_dim} and {layout.v_dim} channels"
        words = f"of {layout.kv_heads} kv_heads, {width}"
        if layout.latent:
            words = f"of latent rows, {layout.head_dim} and {layout.v_dim} rotary channels"
        if reach.window:
            words += f", window {reach.window:,}"
        if reach.chunk:
            words += f", chunks of {reach.chunk:,}"
        counts[words] = counts.get(words, 0) + 1
    return "; ".join(f"{count} layers {words}" for words, count in counts.items())
