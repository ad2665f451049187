"""How far an implementation may be from the float64 reference, and where the numbers come from.

``quantpage.agreement`` measures what may be off, for benches too. The two functions at the end
bound float32 arithmetic from its unit, for implementations that round nothing to 16 bits.

A float32 dot product of n terms is off by at most n u |a||b| with u = 2^-24, and by about
sqrt(n) u in practice. Attention is two of them (head_dim, then context) with an exponential
between, which turns an absolute error of a score into a relative one of a weight.
"""

import torch

from quantpage.agreement import FLOAT32_UNIT, Allowed, allowed
from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.formats import QuantSpec
from quantpage.ops.attend import AttendParams


def rounding_error(spec: QuantSpec) -> float:
    """|held - x| / |x| that rows of normal numbers may have once they went through codes."""
    code = spec.code
    if code.is_float:
        # e4m3: half of 2^-3, and the scale's own rounding.
        return 0.04
    # A uniform error over even steps, of which a row's range of 10 deviations takes all.
    return 1e-6 if code.exact else 10 / 12**0.5 / (code.qmax - code.qmin)


def assert_agrees(
    got: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    layer: LayerKV,
    batch: BatchPlan,
    params: AttendParams,
    low: torch.dtype = torch.float16,
) -> None:
    """One result of a step, in the basis of the cache; see ``allowed``."""
    assert_within(allowed(q, layer, batch, params, low), got)


def assert_within(wanted: Allowed, got: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Output and log-sum-exp of the step that ``wanted`` is of."""
    assert not (said := wanted.wrong(*got)), said


def attention_atol(head_dim: int, context: int, values: float = 4.0) -> float:
    """Absolute error of an output whose values are at most ``values`` large.

    Scores are at most about 30 here, so that a score is off by 30 sqrt(head_dim) u and a weight
    relatively by as much; summing them over the context adds sqrt(context) u. A factor of 8
    covers the tail of the random walk.
    """
    score = 30 * head_dim**0.5 * FLOAT32_UNIT
    return 8 * values * (score + max(context, 1) ** 0.5 * FLOAT32_UNIT)


def lse_atol(head_dim: int) -> float:
    """Absolute error of a log-sum-exp up to about 40."""
    return 8 * (40 + 30 * head_dim**0.5) * FLOAT32_UNIT


def fp8_ties():
    """Numbers halfway between two neighbours of e4m3, and the codes that half to even gives."""
    bits = torch.arange(0, 0x7E, dtype=torch.uint8)
    numbers = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    halfway = ((numbers[:-1] + numbers[1:]) / 2).float()
    even = bits + (bits & 1)
    return torch.cat([halfway, -halfway]), torch.cat([even, even | 0x80])


def same_save_ties(got: torch.Tensor, wanted: torch.Tensor, spec: QuantSpec) -> None:
    """Numbers of two writers that differ by float32 rounding before they round to codes.

    A number on a tie lands one code further: one step, and rarely. A scale or zero on a tie of its
    16 bits moves by 2^-11 of itself and takes its whole row with it: with an error of a few
    2^-24 before it, one row in a thousand or two, so at most 3 here and one in twenty.
    """
    got, wanted = got.double(), wanted.double()
    reach = wanted.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    off = (got - wanted).abs() / reach
    # Coarsest step of a code relative to the largest number of the row.
    step = 2e-6 if spec.code.exact else 1 / spec.code.qmax
    if spec.code.is_float:
        step = 1 / 14
    elif spec.zero_point:
        step = 2 / (spec.code.qmax - spec.code.qmin)
    assert off.max() <= 1.02 * step + 2**-9
    moved = off > 1e-5
    rows = moved.double().mean(-1) > 0.25
    assert rows.sum() <= max(3, rows.numel() // 20)
    assert moved[~rows].double().mean() < 2e-3
