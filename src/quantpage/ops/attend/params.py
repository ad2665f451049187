"""What attention computes, apart from whom it computes it for."""

from dataclasses import dataclass, field
from functools import lru_cache
from math import e, isfinite, log2
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quantpage.masks import CausalMask, FullMask, Mask

Segment = Literal["all", "body", "exact"]
"""Which of the keys that the mask shows take part (formats with exact pages only).

Exact is ``exact_pairs``, body is the rest, all is both. Body is read from the codes, exact from the
exact pages, and the two partial results are merged by log-sum-exp (ops/attend/merge).
"""

SEGMENTS: dict[Segment, int] = {"all": 0, "body": 1, "exact": 2}
"""What a kernel is told: its SEGMENT argument."""


NEAR_PAGES = 1
"""Pages before its own that a query sees exactly."""


def exact_pairs(
    queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"], page_size: int
) -> Bool[Tensor, "queries keys"]:
    """Which keys a query sees exactly: those of the first page, of its own and of the one before.

    Keys in pages after the query's own (masks that look ahead) are body. In Triton the rule is
    flash/triton_segments, in the compiled core ``add_part`` (csrc/attend.cpp).
    """
    pages = keys[None] // page_size
    behind = queries[:, None] // page_size - pages
    return (pages == 0) | ((behind >= 0) & (behind <= NEAR_PAGES))


def exact_band(first: int, last: int, page_size: int) -> tuple[int, int]:
    """Half-open key range that holds, with the first page, all that queries first..last (inclusive)
    see exactly."""
    near = max(first // page_size - NEAR_PAGES, 0)
    return near * page_size, (last // page_size + 1) * page_size


@dataclass(frozen=True, slots=True, eq=False)
class AttendFacts:
    """What a check asks of the parameters: one object for all that are alike."""

    sinks: int | None
    """Logits, one a query head."""
    sinks_device: torch.device | None
    mask: str
    """Its kind."""
    window: int | None
    """Keys that a query sees, at most; None: no such limit, or one that only the mask knows."""
    mask_batch: int
    """Requests that it describes; 1: all alike."""
    mask_heads: int
    """kv_heads that it describes; 1: all alike."""
    checked: bool


_facts_of = lru_cache(maxsize=1024)(AttendFacts)


@dataclass(frozen=True, slots=True)
class AttendParams:
    """softmax(softcap(q . k * softmax_scale) + mask) over keys and sink logits, times v.

    Raises ValueError for a scale or a softcap that is not finite and above 0, and for sinks of
    another shape or dtype.
    """

    softmax_scale: float
    mask: Mask = field(default_factory=CausalMask)
    softcap: float | None = None
    """s -> softcap * tanh(s / softcap), before the mask (Gemma 2, arXiv 2408.00118)."""
    sinks: Float[Tensor, " q_heads"] | None = None
    """A logit a head that takes part in the softmax and has no value (gpt-oss)."""
    checked: bool = False
    """True: check the page ids of a plan that is on a GPU. Reads back from the device."""
    facts: AttendFacts = field(init=False, repr=False, compare=False)
    """What checks ask of the parameters."""

    def __post_init__(self) -> None:
        for name, number in (("softmax_scale", self.softmax_scale), ("softcap", self.softcap)):
            if name == "softcap" and number is None:
                continue
            if not (isinstance(number, Real) and isfinite(number) and number > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {number}")
        mask, sinks = self.mask, self.sinks
        if not isinstance(mask, Mask):
            raise ValueError(f"mask: expected a Mask, got {type(mask).__name__}")
        if isinstance(mask, CausalMask):
            for name, tokens in (("window", mask.window), ("sink_tokens", mask.sink_tokens)):
                if tokens is not None and tokens >= 2**31:
                    raise ValueError(f"mask.{name}: expected less than 2^31 tokens, got {tokens}")
        if sinks is not None and not isinstance(sinks, Tensor):
            raise ValueError(f"sinks: expected a tensor [q_heads], got {type(sinks).__name__}")
        if sinks is not None and (sinks.ndim != 1 or not sinks.is_floating_point()):
            raise ValueError(
                f"sinks: expected floating numbers [q_heads], got {sinks.dtype} "
                f"{tuple(sinks.shape)}"
            )
        if sinks is not None and (sinks.is_neg() or not sinks.is_contiguous()):
            object.__setattr__(self, "sinks", sinks.resolve_neg().contiguous())
        facts = _facts_of(
            None if sinks is None else sinks.shape[0],
            None if sinks is None else sinks.device,
            mask.kind,
            mask.window if isinstance(mask, CausalMask) and not mask.sink_tokens else None,
            mask.requests,
            mask.heads,
            self.checked,
        )
        object.__setattr__(self, "facts", facts)


def reach_of(mask: Mask) -> tuple[int | None, int]:
    """Window and sink tokens of a causal mask; None and 0 where every key before is seen."""
    if not isinstance(mask, CausalMask) or mask.window is None:
        return None, 0
    return mask.window, mask.sink_tokens


def causal_or_full(mask: Mask) -> CausalMask | FullMask:
    """``mask``, for kernels that have the rule compiled in; ValueError for any other class, though
    it may call itself of their kind.
    """
    if not isinstance(mask, CausalMask | FullMask):
        raise ValueError(f"mask: expected a CausalMask or a FullMask, got {type(mask).__name__}")
    return mask


def exponent_scale(params: AttendParams) -> tuple[float, float]:
    """What scores are multiplied by for exp2, and the cap per log2; 0: none."""
    if params.softcap is None:
        return params.softmax_scale * log2(e), 0.0
    # exp2(x * 2 log2e) is what tanh(x) is made of.
    return 2 * params.softmax_scale / params.softcap * log2(e), params.softcap * log2(e)
