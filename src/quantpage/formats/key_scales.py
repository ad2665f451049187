"""Scales of keys that are rounded in turn, looked for by what rounding with them would lose.

A row's loss is ``sum_i d_i r_i^2`` (formats/feedback): r_i what rounding leaves of a channel, alike
in all and as large as the row's range. So scales lose, but for a constant,

    sum_i d_i  x  mean over keys of (largest of |H s (k - mean)|)^2      d of H W / (s s') H

which follows from them alone. They are moved down its gradient, and their signs, which queries undo
as they do sizes, are drawn and turned: each choice of them rotates otherwise, at no cost anywhere,
and leaves rows with other ranges and channels that make up for each other better or worse.

The largest number stands for the range, whatever the format: a zero point takes the channel that H
spreads evenly for nothing, but scales that relied on it would ruin near pages in int8 and every
other format without, which a calibration is for as well.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.formats.feedback import lower_factor
from quantpage.formats.rotate import rotate
from quantpage.formats.spec import QuantSpec

_DRAWN, _ROUNDS, _STEPS, _RATE = 64, 2, 40, 0.03
"""Choices of signs drawn first; rounds of steps down the gradient and a turn of every sign. Three
rounds win 1 % more of keys that they were looked for on, and nothing of others."""

WIDEST = 128
"""Channels of a head up to which a search is worth it. Of 256 it finds scales for the very keys and
queries that were measured: of 8,192 tokens 1 % less on others', for a hundred times the time of the
laws (Gemma 3 270M)."""


def search_scales(
    metric: Float[Tensor, "kv_heads head_dim head_dim"],
    keys: Float[Tensor, "rows kv_heads head_dim"],
    scale: Float[Tensor, "kv_heads head_dim"],
    spec: QuantSpec,
) -> Float[Tensor, "kv_heads head_dim"]:
    """Better scales than ``scale``, of either sign, float32.

    metric: mean of q q', in the model's basis. keys: some, about their mean. spec: of codes that
    are rounded in turn.
    """
    with torch.inference_mode(False), torch.enable_grad():
        search = _Search(metric.detach().clone(), keys.detach().clone(), spec)
        logs = scale.detach().clone().float().log()
        signs = search.drawn(logs)
        for _ in range(_ROUNDS):
            logs = search.moved(logs, signs)
            signs = search.turned(logs, signs)
        logs = search.moved(logs, signs)
        return (logs.exp() * signs).contiguous()


class _Search:
    def __init__(self, metric: Tensor, keys: Tensor, spec: QuantSpec) -> None:
        # Of heads only ratios matter: sizes of 1 keep products within float32.
        weight = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        size = keys.square().mean((0, 2)).sqrt()[:, None]
        self.metric = (metric / weight.clamp_min(1e-30)).float()
        self.keys = (keys / size.clamp_min(1e-30)).float()
        self.spec = spec
        self.rotated = spec.rotation == "hadamard"
        self.noise = torch.Generator().manual_seed(0)

    def loss(self, scale: Tensor) -> Tensor:
        """[kv_heads], its logarithm: heads weigh the same."""
        lower, size = lower_factor(self.metric, scale, self.rotated)
        weights = lower.diagonal(dim1=1, dim2=2).square() * size[:, None]
        rows = self.keys * scale
        rows = rotate(rows) if self.rotated else rows
        groups = self.spec.granularity.groups(rows.shape[-1])
        rows, weights = (x.unflatten(-1, (groups, -1)) for x in (rows, weights))
        lost = (rows.abs().amax(-1).square().mean(0) * weights.sum(-1)).sum(-1)
        return lost.clamp_min(1e-30).log()

    def moved(self, logs: Tensor, signs: Tensor) -> Tensor:
        """Sizes, some steps down the gradient."""
        found = logs.clone().requires_grad_()
        steps = torch.optim.Adam([found], lr=_RATE)
        for _ in range(_STEPS):
            steps.zero_grad()
            self.loss(found.exp() * signs).sum().backward()
            steps.step()
        return (found - found.mean(1, keepdim=True)).detach()

    @torch.no_grad()
    def drawn(self, logs: Tensor) -> Tensor:
        """The best of some signs, none changed among them."""
        best = torch.ones_like(logs)
        for _ in range(_DRAWN):
            drawn = torch.randint(0, 2, tuple(logs.shape), generator=self.noise, device="cpu").to(
                best
            )
            best = self._better(logs, best, drawn * 2 - 1)
        return best

    @torch.no_grad()
    def turned(self, logs: Tensor, signs: Tensor) -> Tensor:
        """Signs, each turned in its turn where that is better."""
        for channel in torch.randperm(logs.shape[1], generator=self.noise, device="cpu").tolist():
            other = signs.clone()
            other[:, channel] *= -1
            signs = self._better(logs, signs, other)
        return signs

    def _better(self, logs: Tensor, signs: Tensor, other: Tensor) -> Tensor:
        size = logs.exp()
        less = self.loss(size * other) < self.loss(size * signs)
        return torch.where(less[:, None], other, signs)
