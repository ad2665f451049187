"""A matrix for keys that are rounded in turn, looked for by what rounding with it would lose.

Scales leave what a key's channels have in common: a key is long in some directions and short in
others, and the range of a row, which is that of its longest, serves all. Any matrix that queries
can undo may even that out, and a row's loss (formats/key_scales) then is, but for a constant,

    sum_i d_i  x  mean over keys of (largest of |x B|)^2      d of B^-1 W B^-T

with x and W in the basis of the cache. Best were keys of no direction, ``B = C^-1/2``, were W the
very one of the queries to come and C of the keys; of other texts' it is no better than none. B
starts from nothing and is moved down the gradient, each step on other keys, which finds what texts
share (benchmarks/results/key-turns.csv).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.formats.feedback import factored, mapped_metric
from quantpage.formats.key_map import KeyMap
from quantpage.formats.rotate import rotate
from quantpage.formats.spec import QuantSpec

_STEPS, _RATE, _ROWS = 160, 0.16, 512
"""Steps; the first one's length in every number, over the root of a head's channels, the last one's
is 0; keys that a step looks at."""


def search_turn(
    metric: Float[Tensor, "kv_heads head_dim head_dim"],
    keys: Float[Tensor, "rows kv_heads head_dim"],
    key_map: KeyMap,
    spec: QuantSpec,
) -> Float[Tensor, "kv_heads head_dim head_dim"]:
    """A ``KeyMap.turn`` for a map without one, float32.

    metric: mean of q q', in the model's basis. keys: some, in it too. spec: of codes that are
    rounded in turn.
    """
    rotated = spec.rotation == "hadamard"
    with torch.inference_mode(False), torch.enable_grad():
        weight = mapped_metric(metric.double(), key_map.scale.double(), rotated)
        weight = weight / weight.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
        rows = key_map.keys(keys.detach().clone())
        rows = rotate(rows) if rotated else rows
        rows = (rows / rows.square().mean((0, 2)).sqrt().clamp_min(1e-30)[:, None]).transpose(0, 1)
        found = _moved(weight.float(), rows.contiguous(), spec)
    # H B H: the rotation comes behind it.
    return (rotate(rotate(found).mT.contiguous()).mT if rotated else found).contiguous()


def _moved(weight: Tensor, rows: Tensor, spec: QuantSpec) -> Tensor:
    """weight: [kv_heads, D, D], rows: [kv_heads, rows, D], in the basis of the cache."""
    width = weight.shape[1]
    eye = torch.eye(width, device="cpu")
    groups = spec.granularity.groups(width)
    apart = torch.zeros_like(weight, requires_grad=True)
    rate, parts = _RATE / width**0.5, max(1, rows.shape[1] // _ROWS)
    # First keys, all behind the others, are seen by every step.
    noise = torch.Generator("cpu").manual_seed(0)
    rows = rows[:, torch.randperm(rows.shape[1], generator=noise, device="cpu")]
    steps = torch.optim.Adam([apart], lr=rate)
    before = apart
    for step in range(_STEPS):
        steps.param_groups[0]["lr"] = rate * (1 - step / _STEPS)
        steps.zero_grad()
        try:
            back = torch.linalg.inv(eye + apart)
            lower, size = factored(back @ weight @ back.mT)
        except torch.linalg.LinAlgError:
            # A step too far for numbers of 32 bits.
            return (eye + before).detach()
        before = apart.detach().clone()
        lost = lower.diagonal(dim1=1, dim2=2).square() * size[:, None]
        some = rows[:, step % parts :: parts]
        turned = some + some @ apart
        most = turned.unflatten(-1, (groups, -1)).abs().amax(-1).square().mean(1)
        loss = (most * lost.unflatten(-1, (groups, -1)).sum(-1)).sum(-1)
        # Heads weigh the same.
        loss.clamp_min(1e-30).log().sum().backward()
        steps.step()
    return (eye + apart).detach()
