"""How far an implementation may be from the float64 reference, and where the numbers come from.

A float32 dot product of n terms is off by at most n u |a||b| with u = 2^-24, and by about
sqrt(n) u in practice. Attention is two of them (head_dim, then context) with an exponential
between, which turns an absolute error of a score into a relative one of a weight.
"""

FLOAT32_UNIT = 2.0**-24


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
