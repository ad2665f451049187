"""What each layer loses by each half's format, measured with everything else unquantized.

Errors of two layers, or of keys and values, are nearly independent and small: of the sum of such
errors the KL divergence is about the sum of theirs, as it grows with the square of an error. So one
measurement a layer, half and format is enough to know every combination
(``evaluate/advise``). Everything goes through the cache that will be used: key maps, rounding in
turn and pages kept exact are measured as they are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantpage.evaluate.blocks import Unquantized
from quantpage.evaluate.caches import pages
from quantpage.evaluate.score import Window, divergence
from quantpage.formats import ExactPages, KVFormat, find_format
from quantpage.formats.per_layer import LayerFormats, LayerRule

Half = Literal["key", "value"]


@dataclass(frozen=True, slots=True)
class Part:
    """Keys or values of one layer in one format, everything else unquantized."""

    layer: int
    half: Half
    format: str
    """Of both halves; the other one is not quantized here."""
    exact: bool
    """Beside exact pages: those of the format itself, or of its other half's."""


Losses = Mapping[Part, float]
"""Mean KL divergence a scored token, in nats."""

Pairs = Mapping[KVFormat, tuple[KVFormat, KVFormat]]
"""A format -> the one whose keys it has, and the one whose values."""


def parts_of_layer(layer: int, form: KVFormat, halves: tuple[KVFormat, KVFormat]) -> list[Part]:
    """The parts of a format whose keys and values are those of two others."""
    exact = form.exact_pages is not None
    key, value = halves
    found = [Part(layer, "key", key.name, exact)] if key.key.quantized else []
    return found + ([Part(layer, "value", value.name, exact)] if value.value.quantized else [])


def parts_of(layers: Iterable[int], pairs: Pairs) -> list[Part]:
    """What has to be measured to know every pair in every layer."""
    found = (
        part
        for layer in layers
        for form, halves in pairs.items()
        for part in parts_of_layer(layer, form, halves)
    )
    return list(dict.fromkeys(found))


def measure_losses(
    model: Any,
    windows: Sequence[Window],
    parts: Sequence[Part],
    candidates: Sequence[KVFormat],
    *,
    page_size: int = 64,
    calibration: str | None = "auto",
    each: Callable[[], None] = lambda: None,
    unquantized: Callable[[Any, Window], Unquantized] = Unquantized.of,
) -> dict[Part, float]:
    """The loss of every part on the same windows.

    model: loaded, not attached. parts: with the names of ``candidates``. calibration: as ``attach``
    takes it. each: called when one of ``len(windows) * (len(parts) + 1)`` forwards is done.
    unquantized: of a window, for callers that ask for several parts one after the other.
    """
    by_name = {form.name: form for form in candidates}
    kept = next((form.exact_pages for form in candidates if form.exact_pages is not None), None)
    lost: dict[Part, list[Tensor]] = {part: [] for part in parts}
    for window in windows:
        exact = unquantized(model, window)
        each()
        for part, found in lost.items():
            formats = _alone(part, by_name[part.format], kept)
            other = exact.changed(model, part.layer, pages(formats, page_size, calibration))
            found.append(divergence(exact.predictions, other))
            each()
    return {part: float(torch.cat(found).mean()) for part, found in lost.items()}


def _alone(part: Part, form: KVFormat, kept: ExactPages | None) -> LayerFormats:
    """This part in pages, and nothing else; near pages in 16 bits, as no half has some alone."""
    none = find_format("none")
    key, value = (form.key, none.value) if part.half == "key" else (none.key, form.value)
    made = KVFormat(f"{part.half} of {form.name}", key, value, kept if part.exact else None)
    return LayerFormats(none, (LayerRule("layers", made, ranges=((part.layer, part.layer),)),))
