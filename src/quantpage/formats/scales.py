"""Scales that are given, not computed: one set a layer, tied to the format they belong to.

A scale of the wrong shape is the commonest silent error of static quantization (a per-channel
scale read as per-head, a sharded tensor loaded whole): every tensor is checked when it comes in,
and the message says for which layer, which half, what was expected and what came. Shapes are those
of ``Granularity.scale_shape``: [kv_heads, head_dim] one a channel, [kv_heads, 1] one a kv_head,
[1, 1] one a tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from quantpage.errors import FormatError
from quantpage.formats.spec import KVFormat, QuantSpec

ScalePair = tuple[Tensor | None, Tensor | None]
"""A scale and its zero."""


@dataclass(frozen=True, slots=True)
class LayerScales:
    """The static scales of one layer, [kv_heads or 1, groups] each; None for a half that is dynamic
    or unquantized, and for a zero of a symmetric code."""

    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    key_zero: Tensor | None = None
    """The number that code 0 stands for, shaped as the scale; None for symmetric specs."""
    value_zero: Tensor | None = None

    @property
    def pairs(self) -> tuple[ScalePair, ScalePair]:
        """((key scale, key zero), (value scale, value zero)), [kv_heads or 1, groups] each, as
        ``add_layer`` takes them."""
        return (self.key_scale, self.key_zero), (self.value_scale, self.value_zero)


@dataclass(frozen=True, slots=True)
class StaticScales:
    """Scales of every layer for one format; shapes are checked when it is built.

    Raises FormatError for a scale that is missing, superfluous, not finite or of another shape.
    """

    format: KVFormat
    kv_heads: int
    head_dim: int
    """Channels of a key."""
    layers: Mapping[int, LayerScales]
    value_head_dim: int | None = None
    """Channels of a value; None: as a key."""

    def __post_init__(self) -> None:
        if self.format.dynamic:
            raise FormatError(
                f"format: expected a static one, got {self.format.name}, which computes its scales"
            )
        value_dim = self.head_dim if self.value_head_dim is None else self.value_head_dim
        for index, given in self.layers.items():
            for half, spec, width, scale, zero in (
                ("key", self.format.key, self.head_dim, given.key_scale, given.key_zero),
                ("value", self.format.value, value_dim, given.value_scale, given.value_zero),
            ):
                shape = None
                if spec.quantized and not spec.dynamic:
                    shape = spec.granularity.scale_shape(self.kv_heads, width)
                name = f"layer {index}, {half}"
                kind = f"{self.format.name} ({_owner(spec)})"
                _check(f"{name} scale", scale, shape, kind, positive=True)
                _check(f"{name} zero", zero, shape if spec.zero_point else None, kind)

    def find(self, layer: int) -> LayerScales:
        """The scales of ``layer``; FormatError where there are none."""
        if layer not in self.layers:
            have = f"{min(self.layers)} .. {max(self.layers)}" if self.layers else "no layer"
            raise FormatError(
                f"layer {layer}: expected static scales for {self.format.name}, got them for {have}"
            )
        return self.layers[layer]

    def to(self, device: torch.device | str) -> "StaticScales":
        """The same scales on ``device``, in the specs' scale dtypes."""
        moved = {}
        for index, given in self.layers.items():
            key, value = self.format.key.scale_dtype, self.format.value.scale_dtype
            moved[index] = LayerScales(
                _moved(given.key_scale, device, key),
                _moved(given.value_scale, device, value),
                _moved(given.key_zero, device, key),
                _moved(given.value_zero, device, value),
            )
        return StaticScales(self.format, self.kv_heads, self.head_dim, moved, self.value_head_dim)

    def heads(self, first: int, last: int) -> "StaticScales":
        """The scales of kv_heads first .. last - 1: what one of several shards needs.

        Raises ValueError for heads that are not there.
        """
        if not 0 <= first < last <= self.kv_heads:
            raise ValueError(
                f"first, last: expected a range within 0..{self.kv_heads}, got {first}..{last}"
            )

        def cut(plane: Tensor | None) -> Tensor | None:
            # A single row serves all heads (one scale a tensor).
            return plane if plane is None or plane.shape[0] == 1 else plane[first:last]

        layers = {
            index: LayerScales(
                cut(each.key_scale),
                cut(each.value_scale),
                cut(each.key_zero),
                cut(each.value_zero),
            )
            for index, each in self.layers.items()
        }
        return StaticScales(self.format, last - first, self.head_dim, layers, self.value_head_dim)

    def digest(self) -> bytes:
        """A short hash of every number: seeds the prefix cache, names a saved cache."""
        made = blake2b(repr(self.format).encode(), digest_size=16)
        for index in sorted(self.layers):
            for half, pair in zip(("key", "value"), self.layers[index].pairs, strict=True):
                for plane in pair:
                    made.update(f"{index} {half} {plane is not None}".encode())
                    if plane is not None:
                        made.update(plane.detach().cpu().double().contiguous().numpy().tobytes())
        return made.digest()


def _owner(spec: QuantSpec) -> str:
    """Who owns a scale, in words."""
    if not spec.granularity.per_head:
        return "one a tensor"
    group = spec.granularity.group
    if group is None:
        return "one a kv_head"
    return "one a channel" if group == 1 else f"one a group of {group} channels"


def _check(
    name: str,
    plane: Tensor | None,
    shape: tuple[int, int] | None,
    kind: str,
    positive: bool = False,
) -> None:
    if shape is None or plane is None:
        if (shape is None) != (plane is None):
            wanted, got = ("None", "a tensor") if shape is None else (f"{shape}", "None")
            raise FormatError(f"{name}: expected {wanted} for {kind}, got {got}")
        return
    if tuple(plane.shape) != shape:
        raise FormatError(f"{name}: expected {shape} for {kind}, got {tuple(plane.shape)}")
    bad = ~torch.isfinite(plane) | ((plane <= 0) if positive else torch.zeros_like(plane).bool())
    if bad.any():
        head, group = bad.nonzero()[0].tolist()
        wanted = "positive finite numbers" if positive else "finite numbers"
        raise FormatError(
            f"{name}[{head}, {group}]: expected {wanted}, got {plane[head, group].item()}"
        )


def _moved(plane: Tensor | None, device: torch.device | str, dtype: torch.dtype) -> Tensor | None:
    return None if plane is None else plane.to(device=device, dtype=dtype)
