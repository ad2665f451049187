"""A needle in a text: a number said once, asked for at the end.

The answer is forced, a digit after the other, so that one forward tells whether a greedy answer
would be right: exactly when each of its tokens is the most likely one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.evaluate.score import Window

SAID = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
ASKED = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True, slots=True)
class Needle:
    """One cell of the grid."""

    length: int
    """Tokens, the answer included."""
    depth: float
    """Where the needle is said: 0 at the beginning of the text, 1 right before the question."""
    window: Window


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of a needle."""

    right: bool
    """Whether a greedy answer is the key."""
    probability: float
    """Of the key, all of its tokens."""


def make_needles(
    tokenizer: Any, text: str, lengths: Sequence[int], depths: Sequence[float]
) -> Iterator[Needle]:
    """A needle for each length and depth, in a piece of text, with a key of its own.

    Raises ValueError for a text that is too short, or a length that only the needle would fill.
    """
    drawn = Random(0)
    # Eight characters a token are more than English ever takes.
    filler = tokenizer(text[: 8 * max(lengths)], return_tensors="pt").input_ids[0]
    for length in lengths:
        for depth in depths:
            key = drawn.randrange(10000, 99999)
            said, asked, answer = (
                tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids[0].long()
                for words in (SAID.format(key=key), ASKED, f" {key}")
            )
            room = length - len(said) - len(asked) - len(answer)
            if room < 1:
                raise ValueError(
                    f"needle lengths: expected more than the {length - room} tokens of needle and "
                    f"question, got {length}"
                )
            if len(filler) < room:
                raise ValueError(
                    f"text: expected at least {room} tokens around a needle, got {len(filler)}"
                )
            # The first token may be one that begins every text.
            at = 1 + round(depth * (room - 1))
            parts = [filler[:at], said, filler[at:room], asked, answer]
            tokens = torch.cat(parts)[None]
            yield Needle(length, depth, Window(tokens, length - len(answer)))


def judge(window: Window, found: Float[Tensor, "scored vocabulary"]) -> Answered:
    """What log-probabilities of the answer's tokens say."""
    answer = window.tokens[0, window.prompt :].to(found.device)
    right = bool((found.argmax(-1) == answer).all())
    return Answered(right, float(found.gather(1, answer[:, None]).sum().exp()))
