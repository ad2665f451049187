"""Between the projection and the page: bias, norm, rotation by position, key map, basis.

Each step says what float32 may have done to a row so far: its slack, an absolute error that no
channel of the row exceeds.
"""

from dataclasses import dataclass

import numpy as np

from .numbers import UNIT, block_of, rotate


@dataclass(frozen=True, slots=True)
class Rows:
    """[tokens, heads, head_dim] and what each of them may be off: [tokens, heads, 1]."""

    x: np.ndarray
    slack: np.ndarray

    @classmethod
    def exact(cls, x: np.ndarray) -> "Rows":
        """As they were given."""
        return cls(x, np.zeros((*x.shape[:2], 1)))

    def __getitem__(self, which) -> "Rows":
        return Rows(self.x[which], self.slack[which])

    def channels(self, which: slice) -> "Rows":
        """Of each row these."""
        return Rows(self.x[..., which], self.slack)


@dataclass(frozen=True, slots=True)
class Turn:
    """The metric W of a head's queries as sum_i cost_i (e_i + sum_{j > i} lower_ji e_j)^2."""

    lower: np.ndarray
    """[kv_heads, head_dim, head_dim], 0 on the diagonal and above."""
    cost: np.ndarray
    """[kv_heads, head_dim]."""

    @classmethod
    def of(cls, metric: np.ndarray, scale: np.ndarray, rotated: bool) -> "Turn":
        """metric: [kv_heads, head_dim, head_dim], of queries as they come; scale: the map's."""
        own = metric / scale[:, :, None] / scale[:, None, :]
        if rotated:
            own = rotate(np.swapaxes(rotate(own), 1, 2))
        own = (own + np.swapaxes(own, 1, 2)) / 2
        width = own.shape[-1]
        mean = np.trace(own, axis1=1, axis2=2)[:, None, None] / width
        # docs: a hundredth of the mean on the diagonal, so that nothing is free.
        root = np.linalg.cholesky(own / mean + 0.01 * np.eye(width))
        on = np.diagonal(root, axis1=1, axis2=2)
        # docs: in 16 bits, so that every implementation multiplies by the same numbers.
        lower = np.clip(np.tril(root / on[:, None, :], -1), -65504, 65504)
        return cls(lower.astype(np.float16).astype(np.float64), np.square(on))


@dataclass(frozen=True, slots=True)
class Rope:
    """theta and channels of a rotation."""

    theta: float
    rotary_dim: int
    interleaved: bool


def beside(first: Rows, second: Rows) -> Rows:
    """The channels of both."""
    return Rows(
        np.concatenate([first.x, second.x], -1),
        np.maximum(first.slack, second.slack),
    )


def size(x: np.ndarray) -> np.ndarray:
    """Of each row its largest number, where it is one."""
    return np.nan_to_num(np.abs(x), nan=0.0, posinf=0.0).max(-1, keepdims=True)


def with_bias(rows: Rows, bias: np.ndarray) -> Rows:
    """bias [heads, head_dim]."""
    x = rows.x + bias
    return Rows(x, rows.slack + UNIT * 2 * size(x))


def normed(rows: Rows, weight: np.ndarray, eps: float) -> Rows:
    """The root mean square of each row becomes 1, times weight [head_dim]."""
    width = rows.x.shape[-1]
    with np.errstate(invalid="ignore"):
        root = np.sqrt(np.square(rows.x).mean(-1, keepdims=True) + eps)
        x = rows.x / root * weight
        grown = np.abs(weight).max() / root * rows.slack * 2
    grown = np.nan_to_num(grown, nan=0.0)
    return Rows(x, grown + (width + 8) * UNIT * size(x))


def turned(rows: Rows, positions: np.ndarray, rope: Rope) -> Rows:
    """Pairs of channels by angle position * theta ** (-2 i / rotary_dim)."""
    r = rope.rotary_dim
    angle = positions[:, None] * rope.theta ** (-np.arange(0, r, 2) / r)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x = rows.x.copy()
    first, second = (
        (slice(0, r, 2), slice(1, r, 2)) if rope.interleaved else (slice(r // 2), slice(r // 2, r))
    )
    a, b = rows.x[..., first], rows.x[..., second]
    with np.errstate(invalid="ignore"):
        x[..., first], x[..., second] = a * cos - b * sin, b * cos + a * sin
    return Rows(x, 2 * rows.slack + 12 * UNIT * size(rows.x))


def mapped_keys(rows: Rows, scale: np.ndarray, mean: np.ndarray | None) -> Rows:
    """scale (k - mean), both [kv_heads, head_dim]."""
    taken = 0.0 if mean is None else mean
    with np.errstate(invalid="ignore"):
        x = (rows.x - taken) * scale
    largest = scale.max(-1)[:, None]
    return Rows(x, largest * (rows.slack + 3 * UNIT * size(np.abs(rows.x) + np.abs(taken))))


def mapped_queries(rows: Rows, scale: np.ndarray) -> Rows:
    """q / scale, of the kv_head that each query head belongs to."""
    wide = np.repeat(scale, rows.x.shape[1] // len(scale), 0)
    x = rows.x / wide
    return Rows(x, rows.slack / wide.min(-1)[:, None] + 2 * UNIT * size(x))


def in_basis(rows: Rows, rotated: bool) -> Rows:
    """As the cache keeps them."""
    if not rotated:
        return rows
    block = block_of(rows.x.shape[-1])
    total = size(rows.x) * block**0.5
    return Rows(rotate(rows.x), rows.slack * block**0.5 + (block + 2) * UNIT * total)
