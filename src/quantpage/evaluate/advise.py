"""The format of every layer, keys and values apart, that loses least within so many bits a number.

    bits of a choice     16 times the bytes that a request of ``context`` tokens holds, of those of
                         16 bits: scales, zeros, pages kept exact and the unused end of the last
                         page are all in it
    loss of a choice     the sum of its parts', each measured alone (evaluate/sensitivity)

Choosing is a knapsack with one item a layer, solved for all budgets at once: of all choices of the
layers so far those are kept that no other beats in both bytes and loss. That is exact; only where
more than ``_KEPT`` are left, they are thinned out evenly.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from quantpage.cache.sizes import LayerPlan
from quantpage.errors import FormatError
from quantpage.evaluate.score import Window
from quantpage.evaluate.sensitivity import Losses, measure_losses, parts_of, parts_of_layer
from quantpage.formats import KVFormat, join
from quantpage.formats.per_layer import LayerFormats, LayerRule, ranges_of
from quantpage.integrations.hf_transformers.sizes import CacheShape, cache_shape

CANDIDATES = ("int8", "int4")
"""Whose keys and values are chosen from, where nobody says."""
_KEPT = 4096
"""Choices that are kept while layers are added."""
_SHOWN = 48
"""Points of a curve."""


@dataclass(frozen=True, slots=True)
class Point:
    """One choice of formats, what it takes and what it is expected to lose."""

    formats: LayerFormats
    bits: float
    """A number, of everything that is held."""
    loss: float
    """Expected KL divergence a token, in nats."""

    @property
    def line(self) -> str:
        """As ``--kv-format`` takes it."""
        return self.formats.name


@dataclass(frozen=True, slots=True)
class Advice:
    """The best choice within a budget, and what it was chosen over."""

    budget: float
    """Bits a number."""
    context: int
    """Tokens of the request whose bytes are counted."""
    chosen: Point
    curve: tuple[Point, ...]
    """Best choices from the fewest bits to the most."""
    uniform: tuple[Point, ...]
    """One format for all layers."""
    losses: Losses
    """What was measured, part by part."""


def advise(
    model: Any,
    windows: Sequence[Window],
    budget: float,
    *,
    candidates: Sequence[str | KVFormat | LayerFormats] = CANDIDATES,
    page_size: int = 64,
    calibration: str | None = "auto",
    context: int = 8192,
    each: Callable[[], None] = lambda: None,
) -> Advice:
    """Measure every layer's parts and choose.

    model: loaded, not attached. budget: bits a number, of everything that a request of ``context``
    tokens holds. candidates: dynamic formats; their keys and their values are combined freely.
    each: called after every forward, of which there are ``forwards``. Raises FormatError for a
    budget below the least that the candidates take.
    """
    # Before anything slow.
    check_budget(model.config, budget, candidates, page_size, context)
    shape, formats = cache_shape(model.config), _read(candidates)
    losses = measure_losses(
        model,
        windows,
        parts_of(shape.paged, pairs_of(formats)),
        formats,
        page_size=page_size,
        calibration=calibration,
        each=each,
    )
    return choose(shape, losses, budget, candidates=formats, page_size=page_size, context=context)


def check_budget(
    config: Any,
    budget: float,
    candidates: Sequence[str | KVFormat | LayerFormats],
    page_size: int = 64,
    context: int = 8192,
) -> None:
    """FormatError for one that no choice can meet; no weights are needed."""
    if not 0 < budget < float("inf"):
        raise ValueError(f"budget: expected bits a number, such as 5.0bits, got {budget}")
    shape, formats = replace(cache_shape(config), dtype=torch.bfloat16), _read(candidates)
    least = min(_bits(_plans(shape, form, page_size), context) for form in pairs_of(formats))
    if budget < least:
        raise FormatError(
            f"budget: expected at least {least:.2f} bits, the fewest that "
            f"{', '.join(form.name for form in formats)} take at {context:,} tokens; got {budget:g}"
        )


def forwards(config: Any, windows: int, candidates: Sequence[str | KVFormat | LayerFormats]) -> int:
    """How often ``advise`` calls its ``each``."""
    parts = parts_of(cache_shape(config).paged, pairs_of(_read(candidates)))
    return windows * (len(parts) + 1)


def choose(
    shape: CacheShape,
    losses: Losses,
    budget: float,
    *,
    candidates: Sequence[KVFormat],
    page_size: int = 64,
    context: int = 8192,
) -> Advice:
    """The best choice within ``budget``, of what was measured; FormatError where none fits."""
    shape = replace(shape, dtype=torch.bfloat16)
    pairs = pairs_of(candidates)
    plans = {form: _plans(shape, form, page_size) for form in pairs}
    layers = list(shape.paged)
    sixteen = sum(plans[next(iter(pairs))][index].unquantized_bytes(context) for index in layers)
    sizes = np.array([[plans[form][at].held_bytes(context) for form in pairs] for at in layers])
    loss = np.array(
        [[_loss(losses, at, form, halves) for form, halves in pairs.items()] for at in layers]
    )
    names = list(pairs)

    def point(size: float, lost: float, chosen: Iterable[int]) -> Point:
        formats = dict(zip(layers, (names[each] for each in chosen), strict=True))
        return Point(_line(formats, shape.count), float(16 * size / sixteen), float(lost))

    front = best_choices(sizes, loss)
    bits = 16 * front.sizes / sixteen
    fitting = np.flatnonzero(bits <= budget * (1 + 1e-9))
    if not len(fitting):
        raise FormatError(
            f"budget: expected at least {bits[0]:.2f} bits, the fewest that the candidates take at "
            f"{context:,} tokens; got {budget:g}"
        )
    # Evenly over the bits, both ends among them.
    wanted = np.linspace(bits[0], bits[-1], min(_SHOWN, len(bits)))
    shown = np.unique(np.searchsorted(bits, wanted * (1 + 1e-9), side="right") - 1)
    at = np.arange(len(layers))
    uniform = [
        point(sizes[at, each].sum(), loss[at, each].sum(), [each] * len(layers))
        for each, form in enumerate(names)
        if form in candidates
    ]
    return Advice(
        budget,
        context,
        point(*front.choice(int(fitting[-1]))),
        tuple(point(*front.choice(int(each))) for each in shown),
        tuple(sorted(uniform, key=lambda each: each.bits)),
        losses,
    )


def pairs_of(candidates: Sequence[KVFormat]) -> dict[KVFormat, tuple[KVFormat, KVFormat]]:
    """Every format that joins the keys of one candidate and the values of one -> those two.

    Two that keep their near pages in different ways are no pair.
    """
    joined: dict[KVFormat, tuple[KVFormat, KVFormat]] = {form: (form, form) for form in candidates}
    for key, value in product(candidates, repeat=2):
        kept = {each.near is None for each in (key, value) if each.exact_pages is not None}
        if len(kept) < 2:
            joined.setdefault(join(key, value), (key, value))
    return joined


@dataclass(frozen=True, slots=True)
class Front:
    """Choices that no other beats in both size and loss, from the smallest to the largest."""

    sizes: np.ndarray
    losses: np.ndarray
    steps: tuple[tuple[np.ndarray, np.ndarray], ...]
    """A layer each: (place among the choices of the layers before, option)."""

    def choice(self, place: int) -> tuple[float, float, list[int]]:
        """(size, loss, the option of every layer) of one of them."""
        size, loss = float(self.sizes[place]), float(self.losses[place])
        options = []
        for before, option in reversed(self.steps):
            options.append(int(option[place]))
            place = int(before[place])
        return size, loss, options[::-1]


def best_choices(sizes: np.ndarray, losses: np.ndarray, kept: int = _KEPT) -> Front:
    """sizes, losses: [layers, options]. One option a layer, sizes and losses added."""
    size, loss = np.zeros(1), np.zeros(1)
    steps = []
    for size_of, loss_of in zip(sizes, losses, strict=True):
        grown = (size[:, None] + size_of).ravel()
        lost = (loss[:, None] + loss_of).ravel()
        order = np.lexsort((lost, grown))
        least = np.minimum.accumulate(lost[order])
        # The first of its size, and less lost than by any smaller one.
        better = np.r_[True, least[1:] < least[:-1]]
        order = order[better]
        if len(order) > kept:
            order = order[np.linspace(0, len(order) - 1, kept).round().astype(int)]
        size, loss = grown[order], lost[order]
        steps.append((order // len(size_of), order % len(size_of)))
    return Front(size, loss, tuple(steps))


def _read(candidates: Sequence[str | KVFormat | LayerFormats]) -> list[KVFormat]:
    chosen = [LayerFormats.of(each) for each in candidates]
    for each in chosen:
        if each.rules:
            raise FormatError(
                f"formats: expected formats to choose from a layer, got {each.name}, which has "
                "chosen already"
            )
    found = [each.default for each in chosen]
    for form in found:
        if not form.dynamic:
            raise FormatError(f"formats: expected dynamic formats to choose from, got {form.name}")
    if not any(form.quantized for form in found):
        raise FormatError("formats: expected a quantized format to choose from, got none")
    return list(dict.fromkeys(found))


def _loss(losses: Losses, layer: int, form: KVFormat, halves: tuple[KVFormat, KVFormat]) -> float:
    found = sum(losses[part] for part in parts_of_layer(layer, form, halves))
    # Rounding of what loses nothing may come out below 0.
    return max(found, 0.0)


def _plans(shape: CacheShape, form: KVFormat, page_size: int) -> dict[int, LayerPlan]:
    return dict(zip(shape.paged, shape.layers(LayerFormats(form), page_size), strict=True))


def _bits(plans: Mapping[int, LayerPlan], context: int) -> float:
    held = sum(each.held_bytes(context) for each in plans.values())
    return 16 * held / sum(each.unquantized_bytes(context) for each in plans.values())


def _line(formats: Mapping[int, KVFormat], count: int) -> LayerFormats:
    """The commonest format for all, and the others by their layers."""
    default, _ = Counter(formats.values()).most_common(1)[0]
    rules = []
    for form in dict.fromkeys(formats.values()):
        if form != default:
            layers = [at for at, each in formats.items() if each == form]
            rules.append(LayerRule("layers", form, ranges=ranges_of(layers)))
    made = LayerFormats(default, tuple(rules))
    made.of_layers(count)
    return made
