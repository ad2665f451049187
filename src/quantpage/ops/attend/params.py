"""What attention computes, apart from whom it computes it for."""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from quantpage.masks import CausalMask, Mask

Segment = Literal["all", "body", "exact"]
"""Which of the keys that the mask shows take part (formats with exact pages only).

With P the page size, query i and key j: exact is ``j < P or j // P == i // P``, body is the rest,
all is both. Body is read from the codes, exact from the exact pages, and the two partial results
are merged by log-sum-exp (ops/attend/merge).
"""

SEGMENTS: dict[Segment, int] = {"all": 0, "body": 1, "exact": 2}
"""What a kernel is told: its SEGMENT argument."""


@dataclass(frozen=True, slots=True)
class AttendParams:
    """softmax(softcap(q . k * softmax_scale) + mask) over keys and sink logits, times v."""

    softmax_scale: float
    mask: Mask = field(default_factory=CausalMask)
    softcap: float | None = None
    """s -> softcap * tanh(s / softcap), before the mask (Gemma 2, arXiv 2408.00118)."""
    sinks: Float[Tensor, " q_heads"] | None = None
    """A logit a head that takes part in the softmax and has no value (gpt-oss)."""
