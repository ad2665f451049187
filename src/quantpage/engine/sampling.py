"""Choosing the next token: Transformers' own logits processors, and a generator an answer.

An answer's draws depend on its seed and its logits alone, so that it does not matter which other
requests share its steps.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantpage.engine.request import Request, TokenChoice
from quantpage.engine.scores import score


def likeliest(logits: Tensor) -> list[int]:
    """The token of the largest number of each row of [rows, vocabulary] logits; -1 where that is
    NaN or infinite, as a row is that has a NaN."""
    if logits.is_cpu:
        # torch takes 160 us for a row of 49k numbers of 16 bits, numpy 5 for their float32.
        rows = logits.float().numpy()
        found = rows.argmax(-1)
        most = np.take_along_axis(rows, found[:, None], -1)[:, 0]
        made: list[int] = np.where(np.isfinite(most), found, -1).tolist()
        return made
    values, tokens = logits.max(-1)
    return tokens.where(values.isfinite(), -1).tolist()


def draw(weights: Tensor, generator: torch.Generator) -> int:
    """A token by [vocabulary] weights, of one number of the generator.

    Every token starts with a number of its own and the lightest of its weight wins: -log(u) / w is
    least for token i with probability w_i. So what rounding moves weights by, as another batch
    does, moves as many draws; on a line of all weights each end would carry what moved before it.
    Raises RuntimeError where weights are not finite or all zero.
    """
    each = weights.double().numpy()
    total = float(each.sum())
    if not 0 < total < math.inf:
        raise RuntimeError(f"logits: expected finite numbers, got weights that sum to {total}")
    key = int(torch.randint(1 << 62, (1,), generator=generator, device="cpu"))
    # Most of a vocabulary weighs next to nothing: it races as one, whose tokens a line tells apart.
    small = each < _SMALL * total
    rest = np.where(small, each, 0.0)
    large = np.flatnonzero(~small)
    race, place = _numbers(key, np.array([len(each), len(each) + 1]))
    times = -np.log(_numbers(key, large)) / each[large]
    mass = float(rest.sum())
    if len(large) and (mass == 0 or times.min() < -np.log(race) / mass):
        return int(large[times.argmin()])
    ends = rest.cumsum()
    # The product may round up to the end, where no token is.
    return int(ends.searchsorted(min(place * ends[-1], math.nextafter(ends[-1], 0.0)), "right"))


_SMALL = 1e-5
"""Of all weights: tokens that weigh less race as one."""


def _numbers(key: int, at: np.ndarray) -> np.ndarray:
    """Uniform in (0, 1), of ``key`` and a place alone: splitmix64 (Steele, Lea and Flood, 2014)."""
    mixed = np.full(at.shape, key, np.uint64) + (at.astype(np.uint64) + 1) * np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> 27)) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> 31)) >> 11).astype(np.float64) * 2.0**-53 + 2.0**-54


_GOLDEN = 0x9E3779B97F4A7C15


class Sampler:
    """The choices of one answer."""

    def __init__(self, request: Request, answer: int) -> None:
        sampling = request.sampling
        self._logprobs, self._greedy = request.logprobs, sampling.temperature == 0
        self._processors = _processors(sampling)
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._bias = dict(sampling.logit_bias)
        self._ends, self._least = sorted(request.stop_tokens), request.min_tokens
        self._made: Counter[int] = Counter()
        self._tokens = list(request.prompt)
        self._follower = None if request.grammar is None else request.grammar.follow()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + answer) % (1 << 63))
        self.plain = (
            self._greedy
            and self._logprobs is None
            and self._follower is None
            and not (self._ends and self._least)
            and not self._bias
            and not self._presence
            and not self._frequency
            and sampling.repetition_penalty == 1
        )
        """Whether the choice is the largest logit and nobody asks for more."""

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> TokenChoice:
        """The next token of [vocabulary] logits, which stay as they are: answers share them."""
        scores = logits.float().cpu()[None]
        if self._bias or self._presence or self._frequency or self._least:
            # Written to below, and float32 on a CPU is the model's own.
            scores = scores.clone()
        scores = self._adjusted(scores)
        if self._greedy:
            token = likeliest(scores)[0]
        else:
            token = draw(scores[0].softmax(-1), self._generator)
        return self.take(token, logits)

    def take(self, token: int, logits: Tensor | None = None) -> TokenChoice:
        """Count a token as chosen; RuntimeError for none, as ``likeliest`` says it."""
        if token < 0:
            raise RuntimeError("logits: expected finite numbers, got NaN or infinity")
        self._tokens.append(token)
        self._made[token] += 1
        if self._follower is not None:
            self._follower.take(token)
        if self._logprobs is None or logits is None:
            return TokenChoice(token, 0.0)
        return score(logits[None], [token], self._logprobs)[0]

    def done(self) -> bool:
        """Whether the grammar is fulfilled and lets nothing follow."""
        return self._follower is not None and self._follower.done()

    def _adjusted(self, scores: Tensor) -> Tensor:
        if self._follower is not None:
            scores = self._follower.restrict(scores)
        if self._bias:
            scores[0, list(self._bias)] += torch.tensor(list(self._bias.values()), device="cpu")
        if self._made and (self._presence or self._frequency):
            counts = torch.tensor(list(self._made.values()), dtype=torch.float32, device="cpu")
            scores[0, list(self._made)] -= self._presence + self._frequency * counts
        if self._ends and self._made.total() < self._least:
            # A tokenizer may name ends that the model has not.
            scores[0, [each for each in self._ends if 0 <= each < scores.shape[1]]] = -torch.inf
        return (
            self._processors(torch.tensor([self._tokens], device="cpu"), scores)
            if self._processors
            else scores
        )


def _processors(sampling: Any) -> Any:
    """Transformers' processors in the order in which ``generate`` applies them."""
    from transformers.generation import logits_process as known

    made = known.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        made.append(known.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1):
        made.append(known.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        made.append(known.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        made.append(known.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        made.append(known.MinPLogitsWarper(sampling.min_p))
    return made
