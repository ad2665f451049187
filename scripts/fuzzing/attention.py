"""Attention over what stands in the pages, in float64, and how far off an implementation may be.

The measure is FlashAttention's: twice the error of a plain run on the same numbers whose operands,
scores, probabilities and output are rounded to a lower precision (that of the implementation's
products), and a few units of the output's own dtype, which partial results and a last rotation
round to.
"""

from dataclasses import dataclass

import numpy as np

from .numbers import UNIT, Mismatch, rotate

UNITS = {"float64": 2.0**-53, "float32": UNIT, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance of 1 from the next number."""
FLOOR = 8
"""Such units of a row's size."""
HUGE = {"float16": 6e4, "bfloat16": 1e30, "float32": 1e30}
"""Of queries that see such a number (what became of an infinity) nothing is asked: products of this
precision overflow with it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request's keys and values as its queries read them."""

    k: np.ndarray
    """[context, kv_heads, head_dim], from the codes; ``near_k`` from the exact pages, if any."""
    v: np.ndarray
    near_k: np.ndarray | None
    near_v: np.ndarray | None
    near: np.ndarray
    """[queries, context]: which are read exactly."""
    shown: np.ndarray
    """[queries, context, kv_heads]."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is computed of scores."""

    scale: float
    softcap: float | None
    sinks: np.ndarray | None


def rounded(x: np.ndarray, to: str) -> np.ndarray:
    """To the precision ``to``; sums of what is no float64 are float32's."""
    if to == "float64":
        return x.astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if to != "bfloat16":
            return x.astype(to).astype(np.float32)
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def attend(q: np.ndarray, seen: Seen, rule: Rule, to: str = "float64"):
    """q [queries, q_heads, head_dim] -> output, log-sum-exp, in the basis of the cache."""
    heads = seen.k.shape[1]
    group = q.shape[1] // heads
    out = np.zeros((*q.shape[:2], seen.v.shape[-1]))
    lse = np.full(q.shape[:2], -np.inf)
    for head in range(q.shape[1]):
        own = head // group
        shown = seen.shown[:, :, own]
        parts = [(seen.k, seen.v, shown & ~seen.near)]
        if seen.near_k is not None:
            parts.append((seen.near_k, seen.near_v, shown & seen.near))
        scores = np.full(shown.shape, -np.inf)
        for k, _, part in parts:
            with np.errstate(invalid="ignore", over="ignore", under="ignore"):
                s = rounded(q[:, head], to) @ rounded(_used(k[:, own], part), to).T
                s = rounded(s * rule.scale, to)
                if rule.softcap is not None:
                    s = rounded(rule.softcap * np.tanh(s / rule.softcap), to)
            scores = np.where(part, s, scores)
        sink = -np.inf if rule.sinks is None else rule.sinks[head]
        with np.errstate(invalid="ignore", under="ignore"):
            top = np.maximum(scores.max(1, initial=-np.inf), sink)
            anchor = np.where(np.isneginf(top), 0.0, top)
            p = np.exp(scores - anchor[:, None])
            total = p.sum(1) + np.exp(sink - anchor)
        lse[:, head] = np.where(
            total == 0, -np.inf, anchor + np.log(np.where(total == 0, 1, total))
        )
        total = np.where(total == 0, 1.0, total)
        for _, v, part in parts:
            weights = rounded(np.where(part, p, 0.0), to)
            rows = _used(v[:, own], part)
            bad = ~np.isfinite(rows)
            with np.errstate(invalid="ignore", under="ignore", over="ignore"):
                plain = weights @ rounded(np.where(bad, 0.0, rows), to)
            # A query is touched by a number that is none only where it sees it.
            plain = np.where((part.astype(np.float64) @ bad) > 0, np.nan, plain)
            out[:, head] += plain
        out[:, head] /= total[:, None]
    return rounded(out, to), lse


def _used(rows: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Rows [context, channels] without those that no query sees, which may be anything."""
    return np.where(part.any(0)[:, None], rows, 0.0)


def check(
    got: tuple[np.ndarray, np.ndarray],
    q: np.ndarray,
    seen: Seen,
    rule: Rule,
    kinds: tuple[str, str, bool],
    missing: tuple[np.ndarray, np.ndarray] | None,
    where: str,
) -> None:
    """got: output and log-sum-exp in the model's basis. kinds: precision of products, dtype of the
    output, whether values are rotated. missing: what a key map took out of each row's scores, and
    the sum of its terms' sizes.

    Where the plain run overflows nothing is asked.
    """
    low, dtype, rotated = kinds
    added: float | np.ndarray = 0.0
    bare = rule if missing is None else Rule(rule.scale, rule.softcap, None)
    want, want_lse = attend(q, seen, bare)
    plain, plain_lse = attend(q, seen, bare, low)
    if rotated:
        want, plain = rotate(want), rounded(rotate(plain), low)
    plain = rounded(plain, dtype).astype(np.float64)
    touched = _touched(seen, HUGE[low], q.shape[1])
    plain[touched], plain_lse[touched] = np.inf, np.inf
    want[touched], want_lse[touched] = 0.0, 0.0
    # A score may be rounded once.
    once = UNITS[low] * (1 + np.abs(np.nan_to_num(want_lse, neginf=0.0)))
    if missing is not None:
        want_lse, plain_lse = want_lse + missing[0], plain_lse + missing[0]
        added = missing[1]
        if rule.sinks is not None:
            want, want_lse = _with_sinks(want, want_lse, rule.sinks)
            plain, plain_lse = _with_sinks(plain, plain_lse, rule.sinks)
    out, lse = got
    told = ~np.isposinf(plain_lse)
    nothing = f"{where}: which queries see nothing"
    _same(told & np.isneginf(lse), told & np.isneginf(want_lse), nothing)
    told = np.isfinite(plain) | ~np.isfinite(want)
    _same(told & np.isfinite(out), told & np.isfinite(want), f"{where}: which outputs are finite")
    told = np.isfinite(plain_lse) | ~np.isfinite(want_lse)
    _same(told & np.isfinite(lse), told & np.isfinite(want_lse), f"{where}: which log-sum-exps are")
    lse_off, lse_error = _off(lse, want_lse, plain_lse)
    lse_floor = 16 * UNIT * (1 + np.abs(np.nan_to_num(want_lse)) + added)
    scores_off = _scores_off(q, seen, rule, low)
    lse_allowed = 2 * lse_error.max(initial=0.0) + once + lse_floor + scores_off
    _most(lse_off - lse_allowed, lse_off, f"{where}: log-sum-exp")
    off, error = _off(out, want, plain)
    want = np.nan_to_num(want)
    size = np.sqrt(np.square(want).mean(-1, keepdims=True)) + np.abs(want)
    floor = FLOOR * max(UNITS[dtype], UNIT) * size + 16 * UNIT * np.abs(want).max(initial=0.0)
    if missing is not None and rule.sinks is not None:
        floor = floor + np.abs(want) * lse_allowed[..., None]
    floor = floor + (scores_off * _largest(seen, q.shape[1]))[..., None]
    _most(off - 2 * error.max(initial=0.0) - floor, off, f"{where}: output")


def _scores_off(q: np.ndarray, seen: Seen, rule: Rule, low: str) -> np.ndarray:
    """[queries, q_heads]: what a score may be off by, whatever the plain run was (that of a single
    row may be lucky).

    A sum of n terms in float32 is off by about sqrt(n) units of their sizes; where both operands
    were rounded before, each term is by a unit of either, which add up as the terms' squares do.
    """
    group = q.shape[1] // seen.k.shape[1]
    q = np.nan_to_num(q, nan=0.0, posinf=0.0, neginf=0.0)
    off = np.zeros(q.shape[:2])
    for keys, near in ((seen.k, False), (seen.near_k, True)):
        if keys is None:
            continue
        keys = np.nan_to_num(keys, nan=0.0, posinf=0.0, neginf=0.0)
        for head in range(q.shape[1]):
            own, mine = keys[:, head // group], q[:, head]
            part = seen.shown[:, :, head // group] & (seen.near == near)
            sums = 2 * UNIT * q.shape[-1] ** 0.5 * (np.abs(mine) @ np.abs(own).T)
            if low != "float32":
                with np.errstate(over="ignore"):
                    sums += 2 * UNITS[low] * np.sqrt(np.square(mine) @ np.square(own).T)
            most = np.where(part, sums, 0.0).max(1, initial=0.0)
            off[:, head] = np.maximum(off[:, head], most * rule.scale)
    return off


def _largest(seen: Seen, q_heads: int) -> np.ndarray:
    """[q_heads]: the largest number of any value."""
    largest = np.zeros(seen.v.shape[1])
    for values in (seen.v, seen.near_v):
        if values is not None:
            values = np.nan_to_num(np.abs(values), nan=0.0, posinf=0.0)
            largest = np.maximum(largest, values.max((0, 2)))
    return np.repeat(largest, q_heads // len(largest))


def _touched(seen: Seen, limit: float, q_heads: int) -> np.ndarray:
    """[queries, q_heads]: which see a number beyond the limit."""
    touched = np.zeros(seen.shown.shape[::2], bool)
    for half, near in (
        (seen.k, False), (seen.v, False), (seen.near_k, True), (seen.near_v, True)
    ):  # fmt: skip
        if half is not None:
            with np.errstate(invalid="ignore"):
                huge = (np.abs(half) > limit).any(-1)
            read = seen.shown & (seen.near == near)[..., None]
            touched |= (read & huge).any(1)
    return np.repeat(touched, q_heads // touched.shape[1], 1)


def _off(got: np.ndarray, want: np.ndarray, plain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far off the result is, and the plain run; 0 where one of them is no number."""
    number = np.isfinite(want) & np.isfinite(plain) & np.isfinite(got)
    got, want, plain = (np.where(number, each, 0.0) for each in (got, want, plain))
    return np.abs(got - want), np.abs(plain - want)


def _with_sinks(out, lse, sinks):
    total = np.logaddexp(lse, sinks)
    with np.errstate(invalid="ignore"):
        share = np.where(np.isneginf(lse), 0.0, np.exp(lse - total))
    return out * share[..., None], total


def _same(got: np.ndarray, wanted: np.ndarray, what: str) -> None:
    if not np.array_equal(got, wanted):
        at = tuple(map(int, np.argwhere(got != wanted)[0]))
        raise Mismatch(f"{what}: {int((got != wanted).sum())} of {got.size} differ, first at {at}")


def _most(over: np.ndarray, off: np.ndarray, what: str) -> None:
    if over.size and not (over <= 0).all():
        at = np.unravel_index(int(np.nan_to_num(over, nan=np.inf).argmax()), over.shape)
        raise Mismatch(
            f"{what} at {tuple(map(int, at))} of {over.shape}: error {off[at]:.3g}, "
            f"{over[at]:.3g} more than allowed"
        )
