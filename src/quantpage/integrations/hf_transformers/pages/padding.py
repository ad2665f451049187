"""Which tokens of a batch's rows are padding, as masks tell it: padding is never written to pages.

``kept`` is [rows, tokens] bool, False for padding; None: no token ever was.
"""

from typing import Any

import torch
from torch import Tensor

from quantpage.errors import CacheError

Shape = tuple[int, int, int]
"""(rows, start, new): the step that brings tokens ``start`` .. ``start + new`` of every row."""


def told(mask: Any, kept: Tensor | None, shape: Shape) -> Tensor | None:
    """[rows, start + new] bool, False for padding, as far as a forward's ``attention_mask`` tells.

    Of a mask of all pairs: a new token that no query sees, itself included, is padding.
    """
    rows, start, new = shape
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if hasattr(mask, "quantpage"):
        return mask.quantpage.padding
    if mask.ndim == 2:
        return mask.to(torch.bool)
    if mask.ndim != 4 or mask.shape[-1] != start + new:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    now = seen[..., start:].any(1).any(1).expand(rows, -1)
    if kept is None and bool(now.all()):
        return None
    before = _all(rows, start) if kept is None else kept
    return torch.cat([before.to(now.device), now], 1)


def extended(kept: Tensor | None, padding: Tensor | None, shape: Shape) -> Tensor | None:
    """``kept`` with the step's tokens; ``padding``: what ``told`` gave.

    Raises ValueError for too few tokens, CacheError where a cached token is told otherwise now.
    """
    if kept is None and padding is None:
        return None
    rows, start, new = shape
    before = _all(rows, start) if kept is None else kept
    if padding is None:
        return torch.cat([before, _all(rows, new)], 1)
    if padding.shape[1] < start + new:
        raise ValueError(
            f"attention_mask: expected {start + new} tokens a row, {start} cached and {new} new, "
            f"got {padding.shape[1]}"
        )
    padding = padding.cpu()
    _refuse_changed(padding[:, :start], before)
    return torch.cat([before, padding[:, start : start + new]], 1)


def refuse_other(mask: Any, kept: Tensor | None, length: int) -> None:
    """CacheError where a forward's mask takes padding that is cached for tokens.

    A forward without a mask leaves what is known; one of ones says something else.
    """
    if kept is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    told_tokens = min(length, mask.shape[1])
    if mask.shape[0] == kept.shape[0]:
        _refuse_changed(mask[:, :told_tokens].cpu().to(torch.bool), kept[:, :told_tokens])


def _all(rows: int, tokens: int) -> Tensor:
    return torch.ones(rows, tokens, dtype=torch.bool, device="cpu")


def _refuse_changed(given: Tensor, before: Tensor) -> None:
    """given, before: [rows, tokens] bool, False for padding."""
    changed = (given != before).nonzero()
    if changed.numel():
        row, token = changed[0].tolist()
        was = "a token" if before[row, token] else "padding"
        raise CacheError(
            f"attention_mask: row {row}, token {token} was cached as {was}; expected the "
            "same again, got the opposite"
        )
