"""Views of pages: what an op is given. A view owns nothing.

Ops take views, never owners, so that an engine that owns its tensors (vLLM) can call them: it
builds a ``LayerKV`` over its own memory. Page and head strides are free; the last two dimensions
(page_size, bytes of a row) are contiguous.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantpage.formats import CODES, KeyMap, QuantSpec

_UNQUANTIZED = QuantSpec(CODES["none"])


@dataclass(frozen=True, slots=True)
class QuantizedPages:
    """K pages, or V pages, of one layer."""

    spec: QuantSpec
    codes: Tensor
    """[pages, kv_heads, page_size, head_dim / values_per_byte]."""
    scale: Tensor | None = None
    """Dynamic: [pages, kv_heads, page_size, groups]. Static: [kv_heads or 1, groups].
    None for the 'none' code."""
    zero: Tensor | None = None
    """As ``scale``; None for symmetric specs."""

    def __post_init__(self) -> None:
        if self.codes.ndim != 4:
            raise ValueError(
                "codes: expected [pages, kv_heads, page_size, row], "
                f"got shape {tuple(self.codes.shape)}"
            )
        for name, given, wanted in (
            ("scale", self.scale, self.spec.quantized),
            ("zero", self.zero, self.spec.zero_point),
        ):
            if (given is not None) != wanted:
                raise ValueError(
                    f"{name}: expected {'a tensor' if wanted else 'None'} for code "
                    f"{self.spec.code.name}, got {'None' if given is None else 'a tensor'}"
                )
            if given is not None:
                self._check_plane(name, given)

    @property
    def pages(self) -> int:
        """Pages in the view."""
        return self.codes.shape[0]

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self.codes.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.codes.shape[2]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.codes.shape[3] * self.spec.code.values_per_byte

    def _check_plane(self, name: str, plane: Tensor) -> None:
        groups = self.spec.granularity.groups(self.head_dim)
        if self.spec.dynamic:
            wanted: tuple[int, ...] = (*self.codes.shape[:3], groups)
        else:
            wanted = self.spec.granularity.scale_shape(self.kv_heads, self.head_dim)
        if tuple(plane.shape) != wanted:
            kind = "dynamic" if self.spec.dynamic else "static"
            raise ValueError(
                f"{name}: expected {wanted} for {kind} {self.spec.code.name}, "
                f"got {tuple(plane.shape)}"
            )


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LayerKV:
    """Both halves of one layer, and its exact pages where the format keeps some."""

    key: QuantizedPages
    value: QuantizedPages
    exact_key: Tensor | None = None
    """[exact pages, kv_heads, page_size, head_dim] in the model's dtype, in the cache's basis
    (rotated where the key spec rotates); None where the format keeps no exact pages."""
    exact_value: Tensor | None = None
    """As ``exact_key`` with the values' head_dim."""
    key_map: KeyMap | None = None
    """What was done to keys before they were rotated and cached; None: nothing."""

    def __post_init__(self) -> None:
        if self.key.codes.shape[:3] != self.value.codes.shape[:3]:
            raise ValueError(
                f"value codes: expected pages, kv_heads, page_size {self.key.codes.shape[:3]} "
                f"as the key codes, got {self.value.codes.shape[:3]}"
            )
        if self.key_map is not None:
            wanted = self.kv_heads, self.key.head_dim
            given = self.key_map.kv_heads, self.key_map.head_dim
            if wanted != given:
                raise ValueError(
                    f"key_map: expected one of kv_heads, head_dim {wanted} as the keys, got {given}"
                )

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.key.page_size

    @property
    def kv_heads(self) -> int:
        """Heads of K and V."""
        return self.key.kv_heads

    @property
    def device(self) -> torch.device:
        """Where the pages live."""
        return self.key.codes.device

    def exact(self) -> "LayerKV":
        """The exact pages as a layer of their own, unquantized."""
        assert self.exact_key is not None and self.exact_value is not None
        return LayerKV(
            QuantizedPages(_UNQUANTIZED, self.exact_key),
            QuantizedPages(_UNQUANTIZED, self.exact_value),
        )
