"""What a cached number means, and whether a page holds the right one.

Rounding is checked, not repeated: the package computes in float32, so that a number close to the
middle of two codes may go to either. ``slack`` bounds what float32 did to a row before it was
rounded; a code has to be the nearest one of a number within it. Where nothing was done to a row and
its scale is a power of two every quotient is exact, and ties have to go to the even code.
"""

from dataclasses import dataclass

import numpy as np

UNIT = 2.0**-24
LARGEST32 = float(np.finfo(np.float32).max)
SMALLEST_SCALE = 2.0**-24
LARGEST16 = 65504.0


class Mismatch(AssertionError):
    """What differed, and by how much."""


@dataclass(frozen=True, slots=True)
class Spec:
    """Keys, or values, of a format."""

    code: str
    """'none', 'int8', 'fp8', 'int6', 'int4' or 'int3'."""
    rotated: bool = False
    zero: bool = False
    given: str = ""
    """Who owns a scale that is given: 'channel' or 'head'; empty: a token and head, computed."""

    @property
    def low(self) -> float:
        """The least code."""
        return -self.high - 1 if self.zero else -self.high

    @property
    def high(self) -> float:
        """The largest code."""
        return {"int8": 127.0, "int6": 31.0, "int4": 7.0, "int3": 3.0, "fp8": 448.0}[self.code]


_INT8, _INT4, _FP8 = Spec("int8", True), Spec("int4", True, True), Spec("fp8")
_INT6, _INT3 = Spec("int6", True, True), Spec("int3", True, True)
_INT8_GIVEN, _INT4_GIVEN = Spec("int8", given="channel"), Spec("int4", zero=True, given="channel")
FORMS: dict[str, tuple[Spec, Spec, str]] = {
    "none": (Spec("none"), Spec("none"), ""),
    "int8": (_INT8, _INT8, ""),
    "int8_exact": (_INT8, _INT8, "16 bits"),
    "fp8": (_FP8, _FP8, ""),
    "int6": (_INT6, _INT6, ""),
    "int4": (_INT4, _INT4, "16 bits"),
    "int3": (_INT3, _INT3, "16 bits"),
    "k8v4": (_INT8, _INT4, "16 bits"),
    "int8_static": (_INT8_GIVEN, _INT8_GIVEN, ""),
    "fp8_static": (Spec("fp8", given="head"), Spec("fp8", given="head"), ""),
    "int4_static": (_INT4_GIVEN, _INT4_GIVEN, ""),
}
"""Keys, values, what exact pages are kept in, if any: docs/formats.md's table once more."""
MIXES: dict[str, tuple[Spec, Spec, str]] = {
    "k=int8,v=fp8": (_INT8, _FP8, ""),
    "k=fp8,v=int4": (_FP8, _INT4, "16 bits"),
    "k=none,v=int4": (Spec("none"), _INT4, "16 bits"),
    "k=int6,v=int3": (_INT6, _INT3, "16 bits"),
    "k=int4_static,v=int8": (_INT4_GIVEN, _INT8, ""),
    "k=int8,v=none": (_INT8, Spec("none"), ""),
    "int4_near8": (_INT4, _INT4, "int8"),
    "k8v4_near8": (_INT8, _INT4, "int8"),
    "k=fp8,v=int3_near8": (_FP8, _INT3, "int8"),
}
"""Keys of one format and values of another, and exact pages in int8."""


def form_of(name: str) -> tuple[Spec, Spec, str]:
    """Of FORMS or MIXES."""
    return FORMS[name] if name in FORMS else MIXES[name]


def _e4m3() -> np.ndarray:
    """The number of each byte; bytes 127 and 255 are NaN."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -size, size)


E4M3 = _e4m3()
_E4M3_UP = E4M3[:127]


def nearest(spec: Spec, t: np.ndarray) -> np.ndarray:
    """Codes, as numbers: half to even, saturating."""
    t = np.clip(t, spec.low, spec.high)
    if spec.code != "fp8":
        return np.rint(t)
    size = np.abs(t)
    above = np.clip(np.searchsorted(_E4M3_UP, size), 1, 126)
    low, high = _E4M3_UP[above - 1], _E4M3_UP[above]
    # Of two neighbours one has an even mantissa: an even byte.
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), t)


def gap(spec: Spec, t: np.ndarray) -> np.ndarray:
    """The distance of codes around ``t``."""
    if spec.code != "fp8":
        return np.ones_like(t)
    exponent = np.floor(np.log2(np.maximum(np.abs(t), 2.0**-6)))
    return 2.0 ** (exponent - 3)


def decode(spec: Spec, stored: np.ndarray) -> np.ndarray:
    """Stored bytes, or numbers of 'none', to codes as float64: [.., head_dim]."""
    if spec.code == "fp8":
        return E4M3[stored.view(np.uint8)]
    if spec.code == "int4":
        pair = np.stack([stored & 15, stored >> 4], -1).astype(np.float64) - 8
        return pair.reshape(*stored.shape[:-1], 2 * stored.shape[-1])
    if spec.code in PLANES:
        bits, start, found = sum(PLANES[spec.code]), 0, 0.0
        width = stored.shape[-1] * 8 // bits
        weight = 1
        for wide in PLANES[spec.code]:
            plane = stored[..., start : start + width * wide // 8]
            parts = [plane >> shift & (2**wide - 1) for shift in range(0, 8, wide)]
            found = found + weight * np.concatenate(parts, -1).astype(np.float64)
            start, weight = start + plane.shape[-1], weight * 2**wide
        return found - 2.0 ** (bits - 1)
    return stored.astype(np.float64)


PLANES = {"int6": (4, 2), "int3": (2, 1)}
"""Bits of a row's planes, the lowest first."""


def finite(x: np.ndarray) -> np.ndarray:
    """As docs/formats.md says of input that is not."""
    return np.nan_to_num(x, nan=0.0, posinf=LARGEST32, neginf=-LARGEST32)


def rotate(x: np.ndarray) -> np.ndarray:
    """Sylvester's matrix, block by block."""
    block = block_of(x.shape[-1])
    signs = np.array([[1]])
    while len(signs) < block:
        signs = np.block([[signs, signs], [signs, -signs]])
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    with np.errstate(invalid="ignore"):
        return (parts @ (signs / block**0.5)).reshape(x.shape)


def block_of(head_dim: int) -> int:
    """The largest power of two that divides it."""
    return head_dim & -head_dim


def check_codes(
    spec: Spec,
    x: np.ndarray,
    slack: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    where: str,
) -> None:
    """Rows x [tokens, heads, head_dim], off by up to slack [tokens, heads, 1], became these codes.

    scale, zero: [tokens or 1, heads, 1 or head_dim] as they stand in the page or were given.
    """
    if not np.isfinite(scale).all() or (zero is not None and not np.isfinite(zero).all()):
        raise Mismatch(f"{where}: a scale or zero is not finite")
    x = finite(x)
    if not spec.given:
        _check_range(spec, x, slack, scale, zero, where)
    shift = 0.0 if zero is None else zero
    t = (x - shift) / scale
    loose = (slack + 4 * UNIT * (np.abs(x) + np.abs(shift))) / scale + 4 * UNIT * np.abs(t)
    clipped = np.clip(t, spec.low, spec.high)
    if np.isnan(codes).any():
        raise Mismatch(f"{where}: a code is NaN")
    reach = gap(spec, np.maximum(np.abs(clipped), np.abs(codes))) / 2 + loose
    _worst(np.abs(codes - clipped) - reach, codes, clipped, f"{where}: code")
    exact = (slack == 0) & (np.frexp(scale)[0] == 0.5) & (zero is None)
    exact = np.broadcast_to(exact, codes.shape)
    wanted = nearest(spec, t)
    _worst(np.where(exact, np.abs(codes - wanted), 0.0), codes, wanted, f"{where}: code of a tie")


def _check_range(spec, x, slack, scale, zero, where: str) -> None:
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    if spec.zero:
        steps = spec.high - spec.low
        wanted, slack_of = (high - low) / steps, 2 * slack / steps
    else:
        wanted, slack_of = np.maximum(-low, high) / spec.high, slack / spec.high
    wanted = np.clip(wanted, SMALLEST_SCALE, LARGEST16)
    loose = half_ulp16(wanted) + slack_of + 4 * UNIT * wanted
    _worst(np.abs(scale - wanted) - loose, scale, wanted, f"{where}: scale")
    if not spec.zero:
        return
    wanted = low - spec.low * scale
    loose = slack + 4 * UNIT * (np.abs(low) + np.abs(high) + np.abs(spec.low * scale))
    wanted = np.clip(wanted, -LARGEST16, LARGEST16)
    loose = loose + half_ulp16(wanted)
    _worst(np.abs(zero - wanted) - loose, zero, wanted, f"{where}: zero")


def half_ulp16(x: np.ndarray) -> np.ndarray:
    """Half the distance of float16 numbers around x."""
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-14)))
    return 2.0 ** (exponent - 11)


def _worst(over: np.ndarray, got: np.ndarray, wanted: np.ndarray, where: str) -> None:
    """Raise for the number that is furthest beyond what is allowed."""
    over = np.where(np.isnan(over), np.inf, over)
    if not over.size or (over <= 0).all():
        return
    at = np.unravel_index(int(over.argmax()), over.shape)
    shape = over.shape
    here, there = (np.broadcast_to(each, shape)[at] for each in (got, wanted))
    raise Mismatch(
        f"{where} at {tuple(map(int, at))} of {shape}: got {here:.8g}, expected {there:.8g}, "
        f"{over[at]:.3g} more than allowed, {int((over > 0).sum())} of them off"
    )


check_close = _worst
