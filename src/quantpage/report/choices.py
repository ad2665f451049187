"""The best choice of a format a layer and half, for every size: the line through the dots.

evaluate/sensitivity measures what each layer's keys and values lose alone, evaluate/advise chooses.
Measured a layer at a time, so that finished layers are kept.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from quantpage.errors import FormatError
from quantpage.evaluate.advise import CANDIDATES, choose, pairs_of
from quantpage.evaluate.blocks import Unquantized
from quantpage.evaluate.score import Window
from quantpage.evaluate.sensitivity import Part, measure_losses, parts_of
from quantpage.formats import find_format
from quantpage.integrations.hf_transformers.sizes import cache_shape
from quantpage.report.costs import CONTEXT
from quantpage.report.predictions import Subjects, window_digest

_FORMATS = tuple(map(find_format, CANDIDATES))


def expected_tokens(config: Any, windows: Sequence[Window]) -> int:
    """What goes through the model where nothing is kept."""
    layers = cache_shape(config).paged
    parts = len(parts_of(layers, pairs_of(_FORMATS)))
    return (parts + 1) * sum(each.tokens.shape[1] for each in windows)


def measure(
    subjects: Subjects,
    config: Any,
    windows: Sequence[Window],
    page_size: int,
    calibration: str | None,
) -> dict[str, Any]:
    """Best choices from the fewest bits to the most, with what each is expected to lose.

    Empty, with the reason, where the candidates do not fit this model.
    """
    shape = replace(cache_shape(config), dtype=torch.bfloat16)
    size = sum(each.tokens.shape[1] for each in windows)
    losses: dict[Part, float] = {}
    # Of a window once, and only where a layer is missing; windows are told apart as objects.
    unquantized = cache(Unquantized.of)
    for number, layer in enumerate(shape.paged, 1):
        parts = parts_of([layer], pairs_of(_FORMATS))
        about = {
            "layer": layer,
            "windows": [window_digest(each) for each in windows],
            "candidates": list(CANDIDATES),
            **subjects.settings,
        }

        def lost(parts: list[Part] = parts, number: int = number) -> list[float]:
            subjects.steps.begin("one layer at a time", f"{number} of {len(shape.paged)}")
            found = measure_losses(
                subjects.model,
                windows,
                parts,
                _FORMATS,
                page_size=page_size,
                calibration=calibration,
                unquantized=unquantized,
            )
            return [found[part] for part in parts]

        found = subjects.parts.measure(lost, "layer", **about)
        subjects.steps.advance(len(parts) * size)
        losses |= dict(zip(parts, found, strict=True))
    try:
        made = choose(
            shape, losses, 16.0, candidates=_FORMATS, page_size=page_size, context=CONTEXT
        )
    except FormatError as error:
        return none(str(error))
    return {
        "context": CONTEXT,
        "tokens": sum(each.scored for each in windows),
        "curve": [_point(each) for each in made.curve],
        "uniform": [_point(each) for each in made.uniform],
        "why": "",
    }


def none(why: str) -> dict[str, Any]:
    """The same form with nothing in it, and why."""
    return {"context": CONTEXT, "tokens": 0, "curve": [], "uniform": [], "why": why}


def _point(point: Any) -> dict[str, Any]:
    return {
        "line": point.line,
        "bits": float(f"{point.bits:.5g}"),
        "loss": float(f"{point.loss:.4g}"),
    }
