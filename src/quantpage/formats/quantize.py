"""The one definition of rounding: numbers to codes and back.

    symmetric     scale = round16(max|x| / qmax)            code = clip(rint(x / scale))
    zero point    scale = round16((max - min) / (qmax - qmin))
                  zero  = round16(min - qmin * scale)       code = clip(rint((x - zero) / scale))
    both          number = scale * code + zero

rint rounds half to even. fp8 codes are a direct saturating cast to e4m3, never through an
integer. round16 is the rounding to the spec's scale dtype, and codes are computed from the rounded
scale, so that a 16-bit scale adds no error of its own. A scale that rounds to 0 (all zeros, a
constant row with a zero point) becomes the smallest that there is, ``smallest_scale``: a scale says
how much a row can weigh, and implementations round probabilities times scales.

Non-finite input: a NaN becomes 0 and an infinity the largest finite number of float32 before
anything else, so that it stays inside its own token and head. Checked mode refuses it instead
(ops/rope_write).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.formats.spec import Code, QuantSpec


class Quantized(NamedTuple):
    """Codes with their scales; ``zero`` is None for symmetric specs."""

    codes: Tensor
    """[*rows, row] in the code's storage dtype, where row is ``code.stored(head_dim)``."""
    scale: Tensor | None
    """[*rows, groups] in the spec's scale dtype; None for the 'none' code or static scales."""
    zero: Tensor | None
    """As ``scale``; None without zero points."""


def quantize(x: Float[Tensor, "*rows head_dim"], spec: QuantSpec) -> Quantized:
    """Quantize rows with one dynamic scale a group of channels.

    ``x`` is already in the spec's basis: rotation is the caller's (formats/rotate).
    """
    if not spec.quantized:
        return Quantized(x, None, None)
    work = finite(x).unflatten(-1, (spec.granularity.groups(x.shape[-1]), -1))
    scale, zero = rounded_range(work, spec)
    codes = _encode(work, scale, zero, spec)
    return Quantized(codes, scale, zero)


def quantize_static(
    x: Float[Tensor, "*rows kv_heads head_dim"],
    scale: Float[Tensor, "kv_heads_or_1 groups"],
    zero: Float[Tensor, "kv_heads_or_1 groups"] | None,
    spec: QuantSpec,
) -> Quantized:
    """Quantize rows with scales that were given; kv_heads may be 1 in ``scale``."""
    work = finite(x).unflatten(-1, (scale.shape[-1], -1))
    return Quantized(_encode(work, scale, zero, spec), None, None)


def dequantize(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*rows head_dim"]:
    """``scale * code + zero`` in ``dtype``; the 'none' code is only cast.

    ``scale`` and ``zero`` broadcast over the rows: [*rows, groups] or [kv_heads, groups].
    """
    if not spec.quantized:
        return codes.to(dtype)
    assert scale is not None
    numbers = decode(codes, spec, dtype).unflatten(-1, (scale.shape[-1], -1))
    numbers = numbers * scale.to(dtype).unsqueeze(-1)
    if zero is not None:
        numbers = numbers + zero.to(dtype).unsqueeze(-1)
    return numbers.flatten(-2)


def decode(codes: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes as numbers, unscaled: [*rows, head_dim]. Exact in float16 and wider."""
    return unpack(codes, spec.code).to(dtype)


def pack(codes: Tensor, code: Code) -> Tensor:
    """Whole codes [*rows, head_dim] as a row of them is stored, of ``code.stored(head_dim)``."""
    if code.fields:
        return _pack_planes(codes, code)
    if code.values_per_byte == 2:
        return pack_nibbles(codes.to(torch.int8))
    return codes.to(code.storage)


def unpack(stored: Tensor, code: Code) -> Tensor:
    """Rows as they are stored -> codes [*rows, head_dim]; floats stay in their storage."""
    if code.fields:
        return _unpack_planes(stored, code)
    return unpack_nibbles(stored) if code.values_per_byte == 2 else stored


def _pack_planes(codes: Tensor, code: Code) -> Tensor:
    lifted = codes.to(torch.int16) + (1 << (code.bits - 1))
    planes, taken = [], 0
    for bits in code.fields:
        parts = ((lifted >> taken) & ((1 << bits) - 1)).unflatten(-1, (8 // bits, -1))
        shifts = torch.arange(0, 8, bits, dtype=torch.int16, device=codes.device)
        planes.append((parts << shifts[:, None]).sum(-2).to(torch.uint8))
        taken += bits
    return torch.cat(planes, -1)


def _unpack_planes(stored: Tensor, code: Code) -> Tensor:
    width = code.channels(stored.shape[-1])
    planes = stored.split([width * bits // 8 for bits in code.fields], -1)
    codes = torch.zeros(*stored.shape[:-1], width, dtype=torch.int16, device=stored.device)
    taken = 0
    for bits, plane in zip(code.fields, planes, strict=True):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device)
        parts = (plane.unsqueeze(-2) >> shifts[:, None]) & ((1 << bits) - 1)
        codes += parts.flatten(-2).to(torch.int16) << taken
        taken += bits
    return (codes - (1 << (code.bits - 1))).to(torch.int8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """int codes -8..7 [*rows, head_dim] -> uint8 [*rows, head_dim / 2], stored + 8."""
    stored = (codes + 8).to(torch.uint8)
    return stored[..., 0::2] | (stored[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [*rows, head_dim / 2] -> int8 codes -8..7 [*rows, head_dim]."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return pairs.flatten(-2).to(torch.int8) - 8


def finite(x: Tensor) -> Tensor:
    """At least float32, NaN as 0 and infinities as float32's largest numbers."""
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    largest = torch.finfo(torch.float32).max
    return torch.nan_to_num(work, nan=0.0, posinf=largest, neginf=-largest)


def smallest_scale(dtype: torch.dtype) -> float:
    """The least dynamic scale: float16's smallest subnormal, else the smallest normal number."""
    found = torch.finfo(dtype)
    return found.smallest_normal * (found.eps if dtype == torch.float16 else 1.0)


def finite_rows(x: Float[Tensor, "*rows head_dim"], dtype: torch.dtype) -> Tensor:
    """As numbers are made finite for codes, in ``dtype``: how exact pages are written."""
    limit = torch.finfo(dtype).max
    return finite(x).clamp(-limit, limit).to(dtype)


def rounded_range(
    work: Float[Tensor, "*rows groups channels"], spec: QuantSpec, factor: float = 1.0
) -> tuple[Float[Tensor, "*rows groups"], Float[Tensor, "*rows groups"] | None]:
    """Scale and zero, rounded, of the groups' range, or of ``factor`` times it about its middle."""
    if not spec.zero_point:
        return _rounded_scale(work.abs().amax(-1) * factor / spec.code.qmax, spec), None
    low, high = work.amin(-1), work.amax(-1)
    span = spec.code.qmax - spec.code.qmin
    # Halves first: high - low of two huge numbers of opposite sign would overflow.
    half = high / 2 - low / 2
    scale = _rounded_scale(half * factor / span * 2, spec)
    zero = low + half * (1.0 - factor) - spec.code.qmin * scale.to(work.dtype)
    return scale, _round_to(zero, spec.scale_dtype)


def _rounded_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    rounded = _round_to(scale, spec.scale_dtype)
    return rounded.clamp_min(smallest_scale(spec.scale_dtype))


def _round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _encode(work: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    if zero is not None:
        work = work - zero.to(work.dtype).unsqueeze(-1)
    scaled = (work / scale.to(work.dtype).unsqueeze(-1)).flatten(-2)
    if spec.code.is_float:
        return scaled.clamp(-spec.code.qmax, spec.code.qmax).to(spec.code.storage)
    low = spec.code.qmin if zero is not None else -spec.code.qmax
    codes = scaled.round().clamp(low, spec.code.qmax)
    return pack(codes, spec.code)
