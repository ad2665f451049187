"""Predictions through each cache beside those without one: text, own answers, needles.

Every window is one forward a cache, compared by evaluate/score; what is kept of it are figures a
token, so that averages, positions and steps are drawn from the same numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from quantpage.evaluate.answers import draw_answer, same_tokens
from quantpage.evaluate.caches import Candidate, unquantized
from quantpage.evaluate.needle import Needle, judge
from quantpage.evaluate.score import Attaching, Scores, Window, log_probabilities
from quantpage.report.parts import Parts
from quantpage.report.steps import Steps

EXACT = "unquantized"
"""What everything is compared with: Transformers' own cache in the same arithmetic."""
BFLOAT16 = "bfloat16"
"""The yardstick: Transformers' own cache, the model's arithmetic in bfloat16."""
_FIELDS = ("losses", "divergences", "overlaps", "agreements")


@dataclass(slots=True)
class Subjects:
    """The model and everything that it is asked through."""

    model: Any
    candidates: Sequence[Candidate]
    parts: Parts
    steps: Steps
    chunk: int
    settings: dict[str, Any]
    """What a candidate's figures depend on beside its name."""
    in_bfloat16: Callable[[], Any] | None = None
    """Makes the same model in bfloat16; None: no yardstick."""
    _low: list[Any] = field(default_factory=list)

    def of(self, name: str) -> tuple[Any, Attaching]:
        """The model and the cache behind a name."""
        if name == EXACT:
            return self.model, unquantized
        if name == BFLOAT16:
            if not self._low:
                assert self.in_bfloat16 is not None
                self._low.append(self.in_bfloat16())
            return self._low[0], unquantized
        return self.model, next(each.attaching for each in self.candidates if each.name == name)

    def names(self, yardstick: bool = False) -> list[str]:
        """Of the candidates; yardstick: and of the model in bfloat16, where there is one."""
        low = [BFLOAT16] if yardstick and self.in_bfloat16 is not None else []
        return [each.name for each in self.candidates] + low


Judge = Callable[[int, Window, Tensor | None, Tensor], Any]
"""(number of the window, window, unquantized and this cache's log-probabilities) -> what is kept;
log-probabilities of the unquantized cache itself come without others."""


def ask(
    subjects: Subjects, kind: str, windows: Sequence[Window], names: Sequence[str], judged: Judge
) -> dict[str, list[Any]]:
    """What ``judged`` says of each window, by name; kept window by window.

    The unquantized predictions of one window are held at a time, and made only where something
    has to be compared with them.
    """
    found: dict[str, list[Any]] = {name: [] for name in names}
    for number, window in enumerate(windows):
        about = {"window": window_digest(window), "chunk": subjects.chunk, **subjects.settings}
        size, exact = window.tokens.shape[1], None
        kept = {name: subjects.parts.find(kind, format=name, **about) for name in names}
        missing = [name for name, each in kept.items() if each is None]
        subjects.steps.expect(-size * (len(names) - len(missing)))
        if not missing or EXACT in names:
            subjects.steps.expect(-size)
        for name in missing:
            subjects.steps.begin(f"{kind} {number + 1} of {len(windows)}", name)
            if exact is None and EXACT not in names:
                exact = _predict(subjects, EXACT, window)
                subjects.steps.advance(size)
            made = judged(number, window, exact, _predict(subjects, name, window))
            subjects.parts.keep(made, kind, format=name, **about)
            kept[name] = made
            subjects.steps.advance(size)
        for name, each in kept.items():
            found[name].append(each)
    return found


def expected_tokens(windows: Sequence[Window], names: Sequence[str]) -> int:
    """What ``ask`` lets through the model where nothing is kept."""
    return sum(each.tokens.shape[1] for each in windows) * (len(names) + 1)


def compared(number: int, window: Window, exact: Tensor | None, other: Tensor) -> dict[str, Any]:
    """A judge: how two predictions of a text differ, token by token."""
    assert exact is not None
    scores = Scores()
    scores.add(window, exact, other)
    return {name: _few_digits(torch.cat(getattr(scores, name))) for name in _FIELDS}


def scores_of(kept: Sequence[dict[str, Any]]) -> Scores:
    """The windows of one cache together, as evaluate/score has them."""
    made = Scores()
    for each in kept:
        for name in _FIELDS:
            getattr(made, name).append(torch.tensor(each[name], dtype=torch.float64, device="cpu"))
    return made


def draw_answers(subjects: Subjects, prompts: Sequence[Window], steps: int) -> list[Window]:
    """The model's own answers, each with its number as the seed."""
    made = []
    for seed, prompt in enumerate(prompts):
        about = {"window": window_digest(prompt), "steps": steps, "seed": seed}

        def draw(prompt: Window = prompt, seed: int = seed) -> list[int]:
            subjects.steps.begin("the model's own answers")
            answer = draw_answer(subjects.model, prompt, steps, seed)
            return answer.tokens[0].tolist()

        tokens = subjects.parts.measure(draw, "drawn", **about)
        subjects.steps.advance(prompt.tokens.shape[1])
        made.append(Window(torch.tensor([tokens], device="cpu"), prompt.prompt))
    return made


def answered(number: int, window: Window, exact: Tensor | None, other: Tensor) -> dict[str, Any]:
    """A judge of own answers: as a text, and where the same seed chooses the same token."""
    same = same_tokens(window, other, number)
    return compared(number, window, exact, other) | {"same": same.long().tolist()}


def needle_found(number: int, window: Window, exact: Tensor | None, other: Tensor) -> list[Any]:
    """A judge of needles."""
    said = judge(window, other)
    return [said.right, float(f"{said.probability:.4g}")]


def needle_cells(needles: Sequence[Needle], found: dict[str, list[Any]]) -> dict[str, Any]:
    """The grid, a list of cells for each name."""
    return {
        "cells": [{"length": each.length, "depth": each.depth} for each in needles],
        "found": {
            name: [{"right": right, "probability": p} for right, p in rows]
            for name, rows in found.items()
        },
    }


def window_digest(window: Window) -> str:
    """Of its tokens, and which of them are predicted."""
    made = blake2b(window.tokens.long().numpy().tobytes(), digest_size=8)
    return f"{made.hexdigest()}-{window.prompt}"


@torch.inference_mode()
def _predict(subjects: Subjects, name: str, window: Window) -> Tensor:
    model, attaching = subjects.of(name)
    with attaching(model) as new_cache:
        return log_probabilities(model, window, new_cache, subjects.chunk)


def _few_digits(x: Tensor) -> list[Any]:
    if x.dtype == torch.bool:
        return x.long().tolist()
    return [float(f"{each:.5g}") for each in x.tolist()]
