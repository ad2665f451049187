"""Teacher-forced log-probabilities through a cache, and how two of them differ."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quantpage.integrations.hf_transformers.modules.arguments import cache_as


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of text: a prompt, and tokens that are scored one after the other."""

    tokens: Int[Tensor, "1 length"]
    prompt: int
    """Tokens that are only read."""

    @property
    def scored(self) -> int:
        """Tokens whose prediction is scored: all after the prompt."""
        return self.tokens.shape[1] - self.prompt


def cut_windows(tokenizer: Any, text: str, count: int, prompt: int, scored: int) -> list[Window]:
    """``count`` windows, evenly spread over the text, each at the start of a paragraph.

    ValueError where they do not fit beside each other: a token that counts twice would make every
    figure look surer than it is.
    """
    length = prompt + scored
    windows, start = [], 0
    for index in range(count):
        following = _paragraph(text, len(text) * (index + 1) // count)
        # Eight characters a token are more than English ever takes.
        end = min(start + 8 * length, following)
        piece = tokenizer(text[start:end], return_tensors="pt").input_ids
        if piece.shape[1] < length:
            before = "" if index + 1 == count else " before the next"
            raise ValueError(
                f"text: expected at least {length} tokens in window {index + 1} of {count}"
                f"{before}, got {piece.shape[1]}; use a longer text, or fewer windows or tokens"
            )
        windows.append(Window(piece[:, :length], prompt))
        start = following
    return windows


def _paragraph(text: str, at: int) -> int:
    """Where the first paragraph after ``at`` begins; ``at`` where none does."""
    found = text.find("\n\n", at)
    return at if found < 0 else found + 2


@torch.inference_mode()
def log_probabilities(
    model: Any, window: Window, new_cache: Callable[[], Any], chunk: int
) -> Float[Tensor, "scored vocabulary"]:
    """The scored tokens' predictions, made as in generation: the prompt, then ``chunk`` tokens at
    a time, everything through the same cache.
    """
    cache = new_cache()
    tokens = window.tokens.to(model.device)
    # The token before the first scored one predicts it; the last token predicts nothing scored.
    ends = [window.prompt, *_steps(window.prompt, tokens.shape[1] - 1, chunk)]
    found, start = [], 0
    for end in ends:
        out = model(
            tokens[:, start:end],
            **cache_as(model, cache),
            use_cache=True,
            logits_to_keep=1 if start == 0 else 0,
        )
        found.append(out.logits[0].float().log_softmax(-1))
        start = end
    return torch.cat(found)


def _steps(start: int, end: int, chunk: int) -> Iterator[int]:
    for step in range(start, end, chunk):
        yield min(step + chunk, end)


@dataclass(slots=True)
class Scores:
    """How one cache's predictions compare with the unquantized cache's, window by window."""

    losses: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)
    agreements: list[Tensor] = field(default_factory=list)
    overlaps: list[Tensor] = field(default_factory=list)

    def add(
        self,
        window: Window,
        exact: Float[Tensor, "tokens vocabulary"],
        other: Float[Tensor, "tokens vocabulary"],
    ) -> None:
        """Take one window's log-probabilities: of the unquantized cache, and of this one."""
        targets = window.tokens[0, window.prompt :].to(other.device)
        self.losses.append(-other.gather(1, targets[:, None])[:, 0].double().cpu())
        diverged, kept = apart(exact, other)
        self.divergences.append(diverged.cpu())
        self.agreements.append((exact.argmax(-1) == other.argmax(-1)).cpu())
        self.overlaps.append(kept.cpu())

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(each.numel() for each in self.losses)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a token."""
        return float(torch.cat(self.losses).mean().exp())

    @property
    def mean_divergence(self) -> float:
        """Mean KL a token, in nats."""
        return float(torch.cat(self.divergences).mean())

    @property
    def p99_divergence(self) -> float:
        """The KL that one token in a hundred exceeds."""
        return float(torch.cat(self.divergences).quantile(0.99))

    @property
    def most_divergence(self) -> float:
        """The KL of the token that differs most."""
        return float(torch.cat(self.divergences).max())

    @property
    def median_divergence(self) -> float:
        """The KL that half of the tokens exceed."""
        return float(torch.cat(self.divergences).median())

    def sure_divergence(self) -> tuple[float, float]:
        """Between what the mean KL lies nine times of ten, were the text another of its kind.

        Pieces of 32 neighbouring tokens are drawn anew 2,000 times: few tokens make most of a mean.
        """
        pieces = [each for window in self.divergences for each in window.split(_PIECE)]
        sums = torch.stack([each.sum() for each in pieces])
        sizes = torch.tensor([len(each) for each in pieces], dtype=sums.dtype, device="cpu")
        noise = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(pieces), (2000, len(pieces)), generator=noise, device="cpu")
        means = sums[drawn].sum(1) / sizes[drawn].sum(1)
        low, high = means.quantile(
            torch.tensor([0.05, 0.95], dtype=means.dtype, device="cpu")
        ).tolist()
        return low, high

    @property
    def mean_overlap(self) -> float:
        """Mean share of probability that both give to the same tokens: 1 - total variation."""
        return float(torch.cat(self.overlaps).mean())

    @property
    def top1(self) -> float:
        """Share of tokens whose most likely successor is the unquantized cache's."""
        return float(torch.cat(self.agreements).double().mean())


def divergence(
    exact: Float[Tensor, "tokens vocabulary"], other: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """KL(exact || other) of log-probabilities, in nats; >= 0 up to rounding."""
    return _in_slices(lambda p, q: _divergence(p, q, p.exp(), q.exp()), exact, other)


def apart(
    exact: Float[Tensor, "tokens vocabulary"], other: Float[Tensor, "tokens vocabulary"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """``divergence``, and how much probability stays: 1 - total variation distance, at most 1."""

    def of(p: Tensor, q: Tensor) -> Tensor:
        likely, unlikely = p.exp(), q.exp()
        moved = (likely - unlikely).abs().sum(-1) / 2
        return torch.stack([_divergence(p, q, likely, unlikely), 1 - moved], -1)

    diverged, kept = _in_slices(of, exact, other).unbind(-1)
    return diverged, kept


def _divergence(p: Tensor, q: Tensor, likely: Tensor, unlikely: Tensor) -> Tensor:
    # Term by term, p log(p / q) - p + q >= 0: rounding of float32 sums would drown 1e-7 otherwise.
    return (likely * (p - q) - likely + unlikely).sum(-1)


def _in_slices(of: Callable[[Tensor, Tensor], Tensor], exact: Tensor, other: Tensor) -> Tensor:
    """In float64, few tokens at a time: all of them would take gigabytes."""
    pairs = zip(exact.split(_SLICE), other.split(_SLICE), strict=True)
    return torch.cat([of(p.double(), q.double()) for p, q in pairs])


_PIECE = 32
"""Tokens that are drawn together: a surprise is one for its neighbours too."""

_SLICE = 64
"""Tokens whose probabilities are compared at once."""

Attaching = Callable[[Any], AbstractContextManager[Callable[[], Any]]]
"""Prepares a model for one cache and yields what makes an empty one of them."""
