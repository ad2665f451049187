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

from quantpage.evaluate.caches import unquantized
from quantpage.evaluate.score import Scores, Window, log_probabilities
from quantpage.formats import ExactPages, KVFormat, find_format
from quantpage.formats.per_layer import LayerFormats, LayerRule
from quantpage.integrations.hf_transformers import attach

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
) -> dict[Part, float]:
    """The loss of every part on the same windows.

    model: loaded, not attached. parts: with the names of ``candidates``. calibration: as ``attach``
    takes it. each: called when one of ``len(windows) * (len(parts) + 1)`` forwards is done.
    """
    by_name = {form.name: form for form in candidates}
    kept = next((form.exact_pages for form in candidates if form.exact_pages is not None), None)
    scores = [Scores() for _ in parts]
    for window in windows:
        # All scored tokens in one step: what a cache says does not depend on the cut.
        with unquantized(model) as new_cache:
            exact = log_probabilities(model, window, new_cache, window.scored)
        each()
        for part, found in zip(parts, scores, strict=True):
            formats = _alone(part, by_name[part.format], kept)
            with attach(model, formats, page_size=page_size, calibration=calibration) as attached:
                other = log_probabilities(model, window, attached.new_cache, window.scored)
            found.add(window, exact, other)
            each()
    return {part: found.mean_divergence for part, found in zip(parts, scores, strict=True)}


def _alone(part: Part, form: KVFormat, kept: ExactPages | None) -> LayerFormats:
    """This part in pages, and nothing else; near pages in 16 bits, as no half has some alone."""
    none = find_format("none")
    key, value = (form.key, none.value) if part.half == "key" else (none.key, form.value)
    made = KVFormat(f"{part.half} of {form.name}", key, value, kept if part.exact else None)
    return LayerFormats(none, (LayerRule("layers", made, ranges=((part.layer, part.layer),)),))
