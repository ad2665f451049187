"""Whether keys that were rounded in turn became codes that this rounding may make of them.

Given the codes that stand in the page, what a channel was rounded from is known: the row, less what
the channels after it were off by. So each code is checked by itself, as those of other rows are,
and one that a tie moved takes nothing along.
"""

import numpy as np

from .keys import Rows, Turn
from .numbers import (
    LARGEST16,
    SMALLEST_SCALE,
    UNIT,
    Mismatch,
    Spec,
    check_close,
    check_codes,
    finite,
    half_ulp16,
)

FACTORS = {"int4": (0.96, 0.88), "int3": (0.88, 0.8)}
"""Of a row's range, tried where scales are computed, by code; others take their range as it is."""
_COMPARED = 16
"""Rows whose range is compared with the other ranges."""
_HUGE = 1e12
"""From here on a loss may be no float32: such rows may be rounded plainly."""


def check_in_turn(
    spec: Spec,
    rows: Rows,
    codes: np.ndarray,
    scales: tuple[np.ndarray, np.ndarray | None],
    turn: Turn,
    where: str,
) -> None:
    """Rows became these codes; scales: scale and zero, as ``check_codes`` takes them."""
    scale, zero = scales
    if not np.isfinite(scale).all() or (zero is not None and not np.isfinite(zero).all()):
        raise Mismatch(f"{where}: a scale or zero is not finite")
    x, slack = finite(rows.x), rows.slack
    huge = (np.abs(x) > _HUGE).any(-1)
    for token, head in zip(*np.nonzero(huge), strict=True):
        one = (slice(token, token + 1), slice(head, head + 1))
        own = [None if p is None else p[one] if p.shape[0] > 1 else p[:, one[1]] for p in scales]
        try:
            check_codes(spec, x[one], slack[one], codes[one], own[0], own[1], where)
        except Mismatch:
            huge[token, head] = False
    shift = 0.0 if zero is None else zero
    numbers = codes * scale + shift
    wanted = x - np.einsum("thj,hji->thi", numbers - x, turn.lower)
    t = np.clip((wanted - shift) / scale, spec.low, spec.high)
    size = np.abs(turn.lower)
    parts = np.abs(numbers) + np.abs(x) + np.abs(shift)
    total = parts + np.einsum("thj,hji->thi", parts, size)
    loose = (slack * (1 + size.sum(1)) + 16 * UNIT * total) / scale
    over = np.abs(codes - t) - 0.5 - loose
    check_close(np.where(huge[..., None], 0.0, over), codes, t, f"{where}: code in turn")
    if not spec.given:
        _check_ranges(spec, Rows(x, slack), numbers, scales, turn, ~huge, where)


def _ranges(spec: Spec, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scale and zero of every range, unrounded, [tokens, heads, 1]."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    made = []
    for factor in FACTORS.get(spec.code, (1.0,)):
        if spec.zero:
            scale = (high - low) * factor / (spec.high - spec.low)
            zero = low + (high - low) / 2 * (1 - factor)
        else:
            scale, zero = np.maximum(-low, high) * factor / spec.high, 0.0 * low
        made.append((np.clip(scale, SMALLEST_SCALE, LARGEST16), zero))
    return made


def _check_ranges(spec, rows: Rows, numbers, scales, turn: Turn, known, where: str) -> None:
    scale, zero = scales
    x, slack = rows.x, rows.slack
    ranges = _ranges(spec, x)
    reach = slack + 8 * UNIT * np.abs(x).max(-1, keepdims=True)
    off = []
    for wanted, bottom in ranges:
        beyond = np.abs(scale - wanted) - half_ulp16(wanted) - 2 * reach / spec.high
        if zero is not None:
            least = np.clip(bottom - spec.low * scale, -LARGEST16, LARGEST16)
            room = half_ulp16(least) + 4 * reach + 8 * UNIT * np.abs(spec.low * scale)
            beyond = np.maximum(beyond, np.abs(zero - least) - room)
        off.append(beyond)
    nearest = np.min(off, 0)
    check_close(
        np.where(known[..., None], nearest, 0.0), scale, ranges[0][0], f"{where}: scale in turn"
    )
    if len(ranges) == 1 or not len(x):
        return
    last = slice(-_COMPARED, None)
    losses = [_loss(spec, x[last], a[last], b[last], turn) for a, b in ranges]
    mine = _cost(numbers[last], x[last], turn)
    worse = mine > 1.01 * np.min(losses, 0) + 1e-12 * np.square(scale[last, :, 0])
    # A sum a rounding away from a tie takes those along that are rounded after it.
    worse &= known[last] & (reach[last, :, 0] < 0.05 * scale[last, :, 0])
    if worse.sum() > 2 + 0.1 * worse.size:
        raise Mismatch(
            f"{where}: {int(worse.sum())} of {worse.size} rows have a range that loses more than "
            "another"
        )


def _cost(numbers: np.ndarray, x: np.ndarray, turn: Turn) -> np.ndarray:
    off = numbers - x
    with np.errstate(over="ignore", invalid="ignore"):
        seen = off + np.einsum("thj,hji->thi", off, turn.lower)
        return (np.square(seen) * turn.cost).sum(-1)


def _loss(spec: Spec, x: np.ndarray, scale: np.ndarray, bottom: np.ndarray, turn: Turn):
    """What rows cost by one range, [tokens, heads]."""
    scale = np.clip(scale.astype(np.float16).astype(np.float64), SMALLEST_SCALE, None)
    zero = 0.0 * scale
    if spec.zero:
        least = np.clip(bottom - spec.low * scale, -LARGEST16, LARGEST16)
        zero = least.astype(np.float16).astype(np.float64)
    numbers, wanted = np.zeros_like(x), x.copy()
    for i in reversed(range(x.shape[-1])):
        t = (wanted[..., i : i + 1] - zero) / scale
        numbers[..., i : i + 1] = np.clip(np.rint(t), spec.low, spec.high) * scale + zero
        off = numbers[..., i : i + 1] - x[..., i : i + 1]
        wanted[..., :i] -= off * turn.lower[:, i, :i]
    return _cost(numbers, x, turn)
