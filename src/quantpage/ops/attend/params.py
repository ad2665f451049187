"""What attention computes, apart from whom it computes it for."""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from quantpage.masks import CausalMask, Mask

Segment = Literal["all", "body", "exact"]
"""Which of the keys that the mask shows take part (formats with exact pages only).

Exact is ``exact_pairs``, body is the rest, all is both. Body is read from the codes, exact from the
exact pages, and the two partial results are merged by log-sum-exp (ops/attend/merge).
"""

SEGMENTS: dict[Segment, int] = {"all": 0, "body": 1, "exact": 2}
"""What a kernel is told: its SEGMENT argument."""


def exact_pairs(
    queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"], page_size: int
) -> Bool[Tensor, "queries keys"]:
    """Which keys a query sees exactly: those of the first page, of its own and of the one before.

    The one statement of the rule; kernels spell it out again. Keys in pages after the query's own
    (masks that look ahead) are body.
    """
    pages = keys[None] // page_size
    behind = queries[:, None] // page_size - pages
    return (pages == 0) | ((behind >= 0) & (behind <= 1))


def exact_band(first: int, last: int, page_size: int) -> tuple[int, int]:
    """Half-open key range that holds, with the first page, all that queries first..last (inclusive)
    see exactly."""
    return max(first // page_size - 1, 0) * page_size, (last // page_size + 1) * page_size


@dataclass(frozen=True, slots=True)
class AttendParams:
    """softmax(softcap(q . k * softmax_scale) + mask) over keys and sink logits, times v."""

    softmax_scale: float
    mask: Mask = field(default_factory=CausalMask)
    softcap: float | None = None
    """s -> softcap * tanh(s / softcap), before the mask (Gemma 2, arXiv 2408.00118)."""
    sinks: Float[Tensor, " q_heads"] | None = None
    """A logit a head that takes part in the softmax and has no value (gpt-oss)."""
