"""Where a format loses: attention's output of every layer and head, keys and values apart.

One unquantized forward is watched. Every layer's attention is asked again with what its pages hold
of its own, unperturbed keys (values as they are), then of its values (keys as they are): the error
of that layer's codes alone, with the maps that ``attach`` gives it. Exact pages are left out: they
would hide where codes lose behind how much of the text they cover.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quantpage.formats import FORMATS, KeyMap, KVFormat
from quantpage.formats.key_statistics import KeyStatistics
from quantpage.formats.per_layer import LayerFormats
from quantpage.formats.rotate import rotate
from quantpage.integrations.hf_transformers import attach
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.cache.paged_layer import PagedLayer
from quantpage.integrations.hf_transformers.keys.calibration import takes_means
from quantpage.integrations.hf_transformers.keys.watch import Attend, watched

Half = Literal["keys", "values"]
OUTLIER = 4.0
"""A channel is an outlier where its root mean square is so many times its head's median one."""


@dataclass(frozen=True, slots=True)
class HeadErrors:
    """One format."""

    format: str
    keys: dict[int, list[float]]
    """Layer -> of each kv_head, |out - exact| / |exact| over all tokens and the query heads that
    read it; empty where keys are not quantized."""
    values: dict[int, list[float]]


@dataclass(frozen=True, slots=True)
class LayerKeys:
    """Keys of one layer on the way to their codes, a few tokens of them."""

    layer: int
    plain: Float[Tensor, "kv_heads tokens head_dim"]
    """After RoPE, as the model's attention reads them."""
    rotated: Float[Tensor, "kv_heads tokens head_dim"]
    mapped: Float[Tensor, "kv_heads tokens head_dim"]
    """Mapped, then rotated."""
    map_in_use: bool
    """False: no map is applied to this model by itself; ``mapped`` shows what these keys ask for,
    as `quantpage calibrate` would measure it."""
    rms: Float[Tensor, "kv_heads head_dim"]
    """Of each channel over all tokens, plain."""

    def outliers(self, head: int) -> list[tuple[int, float]]:
        """(channel, times the head's median), the largest first."""
        times = self.rms[head] / self.rms[head].median().clamp_min(1e-30)
        found = [(at, float(times[at])) for at in range(len(times)) if times[at] > OUTLIER]
        return sorted(found, key=lambda each: -each[1])


def half_of(formats: LayerFormats, half: Half) -> LayerFormats:
    """The codes of only keys, or only values, without exact pages."""
    none = FORMATS["none"]

    def only(each: KVFormat) -> KVFormat:
        key, value = (each.key, none.value) if half == "keys" else (none.key, each.value)
        made = KVFormat(f"{half} of {each.name}", key, value)
        return made if made.quantized else none

    rules = tuple(replace(rule, format=only(rule.format)) for rule in formats.rules)
    return LayerFormats(only(formats.default), rules)


@torch.inference_mode()
def head_errors(
    model: Any,
    tokens: Int[Tensor, "1 tokens"],
    name: str,
    page_size: int = 64,
    calibration: str | None = "auto",
) -> HeadErrors:
    """The errors of one format, on these tokens."""
    found: dict[Half, dict[int, list[float]]] = {"keys": {}, "values": {}}
    caches: dict[Half, QuantPageCache] = {}
    for half in found:
        formats = half_of(LayerFormats.parse(name), half)
        if not any(each.quantized for each in formats.formats):
            continue
        with attach(model, formats, page_size=page_size, calibration=calibration) as attached:
            caches[half] = attached.new_cache()

    def look(index: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> None:
        exact = None
        for half, cache in caches.items():
            layer = cache.layers[index] if index < len(cache.layers) else None
            if not isinstance(layer, PagedLayer) or not cache.formats[index].quantized:
                continue
            exact = attend(key, value) if exact is None else exact
            out = attend(*layer.update(key, value))
            found[half][index] = _relative(out, exact, key.shape[1])

    _forward(model, tokens, look)
    return HeadErrors(name, found["keys"], found["values"])


@torch.inference_mode()
def look_at_keys(
    model: Any,
    tokens: Int[Tensor, "1 tokens"],
    shown: int = 32,
    calibration: str | None = "auto",
) -> list[LayerKeys]:
    """Keys of every layer on these tokens, of which ``shown``, evenly spread, are kept."""
    with attach(model, "int8", calibration=calibration) as attached:
        maps = dict(attached.options.key_maps)
    at = torch.linspace(0, tokens.shape[1] - 1, min(shown, tokens.shape[1]), device="cpu").long()
    found: list[LayerKeys] = []

    def look(index: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> None:
        if query.shape[-1] != key.shape[-1] or any(each.layer == index for each in found):
            return
        k = key[0].transpose(0, 1).float()
        used: KeyMap | None = maps.get(index)
        key_map = used
        if key_map is None:
            statistics = KeyStatistics.of(query[0].transpose(0, 1), k)
            key_map = statistics.key_map(takes_means(model))
        few = k[at.to(k.device)]
        plain, rotated, mapped = (
            each.transpose(0, 1).cpu()
            for each in (few, rotate(few), rotate(key_map.to(k.device).keys(few)))
        )
        rms = k.square().mean(0).sqrt().cpu()
        found.append(LayerKeys(index, plain, rotated, mapped, used is not None, rms))

    _forward(model, tokens, look)
    return sorted(found, key=lambda each: each.layer)


def _forward(
    model: Any, tokens: Tensor, look: Callable[[int, Tensor, Tensor, Tensor, Attend], None]
) -> None:
    with watched(model, look):
        model.base_model(input_ids=tokens.to(model.device), use_cache=False)


def _relative(out: Tensor, exact: Tensor, kv_heads: int) -> list[float]:
    """[rows, tokens, q_heads, channels] -> |out - exact| / |exact| of each kv_head."""
    off, size = (
        x.double().unflatten(2, (kv_heads, -1)).square().sum((0, 1, 3, 4))
        for x in (out - exact, exact)
    )
    return (off / size.clamp_min(1e-300)).sqrt().tolist()
