"""Ranges of numbers that were seen, and the static scales that follow from them.

    absmax       the whole range that was seen
    percentile   all but the farthest thousandth of the numbers that were kept, at each end
    mse          the part of the whole range, from all of it down to a third, whose rounding errors,
                 clipped numbers counted, have the least mean square over the numbers that were kept

The range is that of whoever owns a scale: a channel, a kv_head, or all of them.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.errors import FormatError
from quantpage.formats.quantize import dequantize, quantize_static
from quantpage.formats.scales import ScalePair
from quantpage.formats.spec import QuantSpec

Rule = Literal["absmax", "percentile", "mse"]
"""How much of the range a scale covers."""

_KEPT, _MOST = 256, 2048
"""Rows that are kept of one text, and of all."""
_PERCENTILE = 0.999
_PARTS = tuple(1.0 - 0.04 * step for step in range(17))


@dataclass(slots=True)
class ChannelRanges:
    """Of one layer's keys, or values."""

    low: Float[Tensor, "kv_heads head_dim"]
    high: Float[Tensor, "kv_heads head_dim"]
    rows: Float[Tensor, "rows kv_heads head_dim"]
    """Some that were seen, float32."""

    @classmethod
    def of(cls, x: Float[Tensor, "tokens kv_heads head_dim"]) -> "ChannelRanges":
        """Of some tokens."""
        x = x.float()
        return cls(x.amin(0), x.amax(0), x[:: max(1, -(-len(x) // _KEPT))].clone())

    def __add__(self, other: "ChannelRanges") -> "ChannelRanges":
        """Of both's tokens."""
        return ChannelRanges(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            torch.cat([self.rows, other.rows])[-_MOST:],
        )

    def scales(self, spec: QuantSpec, rule: Rule) -> ScalePair:
        """Scale and zero of a static spec, in its scale dtype; ValueError for an unknown rule."""
        if rule not in get_args(Rule):
            raise ValueError(f"scales: expected one of {', '.join(get_args(Rule))}; got {rule!r}")
        low, high = self._owned(self.low, spec, "low"), self._owned(self.high, spec, "high")
        if rule == "absmax":
            return _pair(low, high, spec)
        if rule == "percentile":
            ends = [
                self._owned(self.rows.quantile(share, 0), spec, side)
                for share, side in ((1 - _PERCENTILE, "low"), (_PERCENTILE, "high"))
            ]
            return _pair(ends[0], ends[1], spec)
        best = _pair(low, high, spec)
        least = self._owned_error(best, spec)
        middle, half = (high + low) / 2, (high - low) / 2
        for part in _PARTS[1:]:
            if spec.zero_point:
                tried = _pair(middle - half * part, middle + half * part, spec)
            else:
                tried = _pair(low * part, high * part, spec)
            error = self._owned_error(tried, spec)
            less = error < least
            least = torch.where(less, error, least)
            best = (_pick(less, tried[0], best[0]), _pick(less, tried[1], best[1]))
        return best

    def _owned(self, x: Tensor, spec: QuantSpec, side: str) -> Tensor:
        """[kv_heads or 1, groups]: the extreme of the channels that share a scale."""
        grouped = x.unflatten(-1, (spec.granularity.groups(x.shape[-1]), -1))
        found = grouped.amin(-1) if side == "low" else grouped.amax(-1)
        if spec.granularity.per_head:
            return found
        return (found.amin(0) if side == "low" else found.amax(0)).unsqueeze(0)

    def _owned_error(self, pair: ScalePair, spec: QuantSpec) -> Tensor:
        """Mean square of rounding errors of each scale's numbers."""
        scale, zero = pair
        assert scale is not None
        codes = quantize_static(self.rows, scale, zero, spec).codes
        error = (dequantize(codes, scale, zero, spec) - self.rows).square().mean(0)
        owned = error.unflatten(-1, (scale.shape[-1], -1)).mean(-1)
        return owned if spec.granularity.per_head else owned.mean(0, keepdim=True)


def _pair(low: Tensor, high: Tensor, spec: QuantSpec) -> ScalePair:
    code = spec.code
    if spec.zero_point:
        scale = _rounded((high - low) / (code.qmax - code.qmin), spec)
        return scale, (low - code.qmin * scale.float()).to(spec.scale_dtype)
    return _rounded(torch.maximum(high, -low) / code.qmax, spec), None


def _rounded(scale: Tensor, spec: QuantSpec) -> Tensor:
    if not torch.isfinite(scale).all():
        raise FormatError("scales: expected finite numbers to take ranges of, got NaN or infinity")
    kept = torch.finfo(spec.scale_dtype)
    # A channel that is 0 in every token has any scale.
    return scale.clamp(kept.tiny, kept.max).to(spec.scale_dtype)


def _pick(where: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.where(where, one, other)
