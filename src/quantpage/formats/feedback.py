"""Rounding a vector's channels one after the other, each making up for those before it.

Attention sees the error e of a rounded key only as ``q . e``. Over a model's queries that is
``e' W e`` squared, W the mean of q q', and not the size of e: an error may go where no query looks.
With W = U diag(d) U', U unit lower triangular,

    e' W e = sum_i d_i (e_i + sum_{j > i} U_ji e_j)^2

so that channels are rounded from the last to the first, each where the errors already made would
have it: GPTQ's and QuIP's rounding of weights (arXiv 2210.17323, 2307.13304), here for a cached
vector. Its term is then the rounding residual itself, and the sum comes for nothing: of a few
narrower and wider ranges the one with the least is kept.

    range of factor f     middle of the row's range +- f times half of it
    target_i = x_i - sum_{j > i} U_ji e_j        code_i = clip(rint((target_i - zero) / scale))
    e_i = scale code_i + zero - x_i              loss = sum_i d_i (scale code_i + zero - target_i)^2

The codes are a function of the row alone, in the same format: readers do not know. Rows for which
no factor has a finite loss are rounded plainly (formats/quantize).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.formats.key_map import KeyMap
from quantpage.formats.quantize import (
    Quantized,
    finite,
    pack,
    quantize,
    quantize_static,
    rounded_range,
)
from quantpage.formats.rotate import rotate
from quantpage.formats.spec import QuantSpec

RANGE_FACTORS = {"int4": (0.96, 0.88), "int3": (0.88, 0.8)}
"""Tried for codes of few bits, by name; other codes and given scales take their range as it is. A
factor costs as much as all else, and these lose at most 4.4 percent more than 1.05, 1, 0.92, 0.85
and 0.78 together (benchmarks/results/range-factors.csv)."""

_DAMPING = 1e-2
"""Added to the metric's diagonal, of its mean: directions that no query took are not free."""


def range_factors(spec: QuantSpec) -> tuple[float, ...]:
    """The factors that a row's range is tried with; of equal losses the first wins."""
    return RANGE_FACTORS.get(spec.code.name, (1.0,)) if spec.dynamic else (1.0,)


def with_feedback(
    key_map: KeyMap, metric: Float[Tensor, "kv_heads head_dim head_dim"], rotated: bool
) -> KeyMap:
    """``key_map`` with what rounding by this metric needs.

    metric: mean of q q' over a model's queries, in its own basis. rotated: whether the codes are of
    rotated keys. ValueError for a metric of another shape, or not finite.
    """
    shape = (key_map.kv_heads, key_map.head_dim, key_map.head_dim)
    if tuple(metric.shape) != shape:
        raise ValueError(f"metric: expected {shape} as the key map, got {tuple(metric.shape)}")
    if not bool(torch.isfinite(metric).all()):
        raise ValueError("metric: expected finite numbers, got NaN or infinity")
    lower, _ = lower_factor(metric.double(), key_map.scale.double(), rotated, key_map.unturn)
    root = lower.diagonal(dim1=1, dim2=2)
    # What tensor cores take whole: a ten thousandth of U changes nothing.
    unit = (lower / root[:, None, :]).tril(-1).clamp(-65504.0, 65504.0).half()
    factor = unit.to(lower.dtype) + torch.diag_embed(root.square())
    return KeyMap(key_map.scale, key_map.mean, factor.float().contiguous(), key_map.turn)


def lower_factor(
    metric: Float[Tensor, "kv_heads head_dim head_dim"],
    scale: Float[Tensor, "kv_heads head_dim"],
    rotated: bool,
    unturn: Float[Tensor, "kv_heads head_dim head_dim"] | None = None,
) -> tuple[Float[Tensor, "kv_heads head_dim head_dim"], Float[Tensor, " kv_heads"]]:
    """L with L L' = the damped metric of keys times ``scale``, and what it was divided by.

    unturn: of a ``KeyMap``.
    """
    return factored(mapped_metric(metric, scale, rotated, unturn))


def mapped_metric(
    metric: Float[Tensor, "kv_heads head_dim head_dim"],
    scale: Float[Tensor, "kv_heads head_dim"],
    rotated: bool,
    unturn: Float[Tensor, "kv_heads head_dim head_dim"] | None = None,
) -> Float[Tensor, "kv_heads head_dim head_dim"]:
    """Mean of q q' in the basis of the cache, of queries that undo ``scale`` and a turn."""
    mapped = metric / scale[:, :, None] / scale[:, None, :]
    if unturn is not None:
        back = unturn.to(mapped.dtype)
        mapped = back.mT @ mapped @ back
    if rotated:
        mapped = rotate(rotate(mapped).mT.contiguous()).mT
    return (mapped + mapped.mT) / 2


def factored(
    mapped: Float[Tensor, "kv_heads head_dim head_dim"],
) -> tuple[Float[Tensor, "kv_heads head_dim head_dim"], Float[Tensor, " kv_heads"]]:
    """L with L L' = ``mapped``, damped, and what it was divided by."""
    # Only ratios matter: a mean of 1 keeps losses within float32.
    size = mapped.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    eye = torch.eye(mapped.shape[1], dtype=mapped.dtype, device=mapped.device)
    return torch.linalg.cholesky(mapped / size[:, None, None] + _DAMPING * eye), size


def quantize_with_feedback(
    x: Float[Tensor, "tokens kv_heads head_dim"],
    spec: QuantSpec,
    feedback: Float[Tensor, "kv_heads head_dim head_dim"],
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Quantized:
    """As ``quantize``, or ``quantize_static`` where a scale is given, by a ``KeyMap.feedback``.

    ``x`` is in the basis of the cache. Integer codes only.
    """
    plain = quantize(x, spec) if scale is None else quantize_static(x, scale, zero, spec)
    work = finite(x)
    width = x.shape[-1]
    grouped = work.unflatten(-1, (spec.granularity.groups(width), -1))
    best: Quantized | None = None
    least = torch.full(x.shape[:-1], torch.inf, dtype=work.dtype, device=x.device)
    for factor in range_factors(spec):
        by, at = (scale, zero) if scale is not None else rounded_range(grouped, spec, factor)
        assert by is not None
        codes, loss = _round_in_turn(work, by, at, spec, feedback)
        found = Quantized(
            codes, None if scale is not None else by, None if scale is not None else at
        )
        # A loss that is no number is never less.
        less = loss < least
        least = torch.where(less, loss, least)
        best = _chosen(less, found, plain if best is None else best)
    assert best is not None
    return best


def _round_in_turn(
    work: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, feedback: Tensor
) -> tuple[Tensor, Tensor]:
    """Stored codes and the loss of every row, by one range."""
    width = work.shape[-1]
    group = width // scale.shape[-1]
    low = spec.code.qmin if zero is not None else -spec.code.qmax
    steps, zeros = (None if x is None else x.to(work.dtype) for x in (scale, zero))
    assert steps is not None
    factor = feedback.to(work.dtype)
    target = work.clone()
    codes = torch.empty_like(work)
    loss = torch.zeros(work.shape[:-1], dtype=work.dtype, device=work.device)
    for i in reversed(range(width)):
        step, wanted = steps[..., i // group], target[..., i]
        base = 0.0 if zeros is None else zeros[..., i // group]
        code = ((wanted - base) / step).round().clamp(low, spec.code.qmax)
        number = step * code + base
        codes[..., i] = code
        loss = loss + factor[:, i, i] * (number - wanted).square()
        error = number - work[..., i]
        target[..., :i] -= error[..., None] * factor[:, i, :i]
    # A NaN target has a NaN loss: its codes are not kept.
    return pack(codes.nan_to_num(0.0).to(torch.int8), spec.code), loss


def _chosen(where: Tensor, one: Quantized, other: Quantized) -> Quantized:
    def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.where(where[..., None], a, b)

    codes = pick(one.codes, other.codes)
    assert codes is not None
    return Quantized(codes, pick(one.scale, other.scale), pick(one.zero, other.zero))
