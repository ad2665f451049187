"""Views of pages: what an op is given. A view owns nothing.

Ops take views, never owners, so that an engine that owns its tensors (vLLM) can call them: it
builds a ``LayerKV`` over its own memory. Page and head strides are free; the last two dimensions
(page_size, bytes of a row) are contiguous. A view is checked when it is built: what no kernel reads
right is not a view.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from quantpage.formats import CODES, KeyMap, QuantSpec, rotate
from quantpage.formats.scales import ScalePair

_UNQUANTIZED = QuantSpec(CODES["none"])
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class QuantizedPages:
    """K pages, or V pages, of one layer.

    Raises ValueError for planes that do not belong together: dimensions, dtypes, devices, strides.
    """

    spec: QuantSpec
    codes: Tensor
    """[pages, kv_heads, page_size, row], where row is ``code.stored(head_dim)``."""
    scale: Tensor | None = None
    """Dynamic: [pages, kv_heads, page_size, groups]. Static: [kv_heads or 1, groups].
    None for the 'none' code."""
    zero: Tensor | None = None
    """As ``scale``; None for symmetric specs."""

    def __post_init__(self) -> None:
        if self.codes.ndim != 4 or 0 in self.codes.shape[1:]:
            raise ValueError(
                "codes: expected [pages, kv_heads, page_size, row], each but pages at least 1, "
                f"got shape {tuple(self.codes.shape)}"
            )
        storage = self.spec.code.storage
        if self.codes.dtype != storage and (storage or self.codes.dtype not in _FLOATS):
            raise ValueError(
                f"codes: expected {storage or 'the dtype of a model'} for code "
                f"{self.spec.code.name}, got {self.codes.dtype}"
            )
        _check_strides("codes", self.codes)
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
        return self.spec.code.channels(self.codes.shape[3])

    def _check_plane(self, name: str, plane: Tensor) -> None:
        dynamic = self.spec.dynamic
        kind = f"{'dynamic' if dynamic else 'static'} {self.spec.code.name}"
        if dynamic:
            groups = self.spec.granularity.groups(self.head_dim)
            wanted: tuple[int, ...] = (*self.codes.shape[:3], groups)
        else:
            wanted = self.spec.granularity.scale_shape(self.kv_heads, self.head_dim)
        if tuple(plane.shape) != wanted:
            raise ValueError(f"{name}: expected {wanted} for {kind}, got {tuple(plane.shape)}")
        dtypes = (self.spec.scale_dtype,) if dynamic else _FLOATS
        if plane.dtype not in dtypes:
            said = " or ".join(map(str, dtypes))
            raise ValueError(f"{name}: expected {said} for {kind}, got {plane.dtype}")
        if plane.device != self.codes.device:
            raise ValueError(
                f"{name}: expected it on {self.codes.device} as the codes, got {plane.device}"
            )
        if dynamic:
            _check_strides(name, plane)
        elif not plane.is_contiguous() or plane.is_neg():
            # A few numbers, which kernels read in order: a view of a checkpoint is copied.
            object.__setattr__(self, name, plane.resolve_neg().contiguous())


def _check_strides(name: str, plane: Tensor) -> None:
    """Rows of a page in order, one after the other; pages and heads apart from each other."""
    _, _, page_size, width = plane.shape
    by_page, by_head, by_row, by_channel = plane.stride()
    if plane.is_neg():
        raise ValueError(f"{name}: expected numbers as they lie in memory, got a negated view")
    fits = (width == 1 or by_channel == 1) and (page_size == 1 or by_row == width)
    if not fits:
        raise ValueError(
            f"{name}: expected contiguous last two dimensions, strides ({width}, 1), "
            f"got ({by_row}, {by_channel}); make such a view contiguous"
        )
    for dimension, stride, size in (("pages", by_page, 0), ("kv_heads", by_head, 1)):
        if plane.shape[size] > 1 and stride < page_size * width:
            raise ValueError(
                f"{name}: expected {dimension} at least {page_size * width} elements apart, "
                f"got a stride of {stride}: they overlap"
            )


@dataclass(frozen=True, slots=True, eq=False)
class LayerFacts:
    """What a check asks of a layer: one object for all that are alike."""

    pages: int
    kv_heads: int
    page_size: int
    head_dim: int
    value_head_dim: int
    key: QuantSpec
    value: QuantSpec
    dtype: torch.dtype
    """Of the key codes."""
    exact_pages: int | None
    """None where there are none beside the codes."""
    near: tuple[QuantSpec, QuantSpec] | None
    """Codes of the exact pages; None: they are as the model computes."""
    device: torch.device
    latent: bool

    @property
    def query_dim(self) -> int:
        """Channels of a query."""
        return self.head_dim + self.value_head_dim if self.latent else self.head_dim

    @property
    def out_dim(self) -> int:
        """Channels of an output."""
        return self.head_dim if self.latent else self.value_head_dim


_facts_of = lru_cache(maxsize=4096)(LayerFacts)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LayerKV:
    """Both halves of one layer, and its exact pages where the format keeps some.

    Raises ValueError for halves that do not belong together, and exact pages of one alone.
    """

    key: QuantizedPages
    value: QuantizedPages
    exact_key: Tensor | QuantizedPages | None = None
    """[exact pages, kv_heads, page_size, head_dim] in the model's dtype, or codes of a finer format
    (``KVFormat.near``), in the cache's basis (rotated where the key spec rotates); None where the
    format keeps no exact pages."""
    exact_value: Tensor | QuantizedPages | None = None
    """As ``exact_key`` with the values' head_dim."""
    key_map: KeyMap | None = None
    """What was done to keys before they were rotated and cached; None: nothing."""
    latent: bool = False
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), absorbed: ``key`` holds one
    latent row a token, which is the token's value and the first channels of its key, ``value`` the
    rotary channels that follow them in the key. A query is as wide as both, an output as a latent.
    """

    _retired: bool = field(init=False, repr=False, compare=False, default=False)
    _facts: LayerFacts | None = field(init=False, repr=False, compare=False, default=None)
    _parts: "tuple[LayerKV, LayerKV] | None" = field(
        init=False, repr=False, compare=False, default=None
    )

    def __post_init__(self) -> None:
        if self.key.codes.shape[:3] != self.value.codes.shape[:3]:
            raise ValueError(
                f"value codes: expected pages, kv_heads, page_size {self.key.codes.shape[:3]} "
                f"as the key codes, got {self.value.codes.shape[:3]}"
            )
        if self.key_map is not None:
            if self.latent:
                raise ValueError(
                    "key_map: expected None for latent rows, which are values too, got one"
                )
            wanted = self.kv_heads, self.key.head_dim
            given = self.key_map.kv_heads, self.key_map.head_dim
            if wanted != given:
                raise ValueError(
                    f"key_map: expected one of kv_heads, head_dim {wanted} as the keys, got {given}"
                )
            if self.key_map.feedback is not None and not self.key.spec.code.integer:
                raise ValueError(
                    "key_map: expected one without feedback, as only integer codes are rounded in "
                    f"turn; got one with it for {self.key.spec.code.name} codes"
                )
        if self.key.codes.device != self.value.codes.device:
            raise ValueError(
                f"value codes: expected them on {self.key.codes.device} as the key codes, "
                f"got {self.value.codes.device}"
            )
        if (self.exact_key is None) != (self.exact_value is None):
            have, none = (
                ("exact_key", "exact_value")
                if self.exact_value is None
                else ("exact_value", "exact_key")
            )
            raise ValueError(f"{none}: expected a tensor as {have}, got None")
        if self.exact_key is not None and self.exact_value is not None:
            if isinstance(self.exact_key, QuantizedPages):
                self._check_near(self.exact_key, self.exact_value)
                return
            if isinstance(self.exact_value, QuantizedPages):
                raise ValueError("exact_value: expected a tensor as exact_key, got codes")
            self._check_exact("exact_key", self.exact_key, self.key.head_dim, self.exact_key)
            self._check_exact("exact_value", self.exact_value, self.value.head_dim, self.exact_key)

    def _check_near(self, key: QuantizedPages, value: Tensor | QuantizedPages) -> None:
        if not isinstance(value, QuantizedPages):
            raise ValueError("exact_value: expected codes as exact_key, got a tensor")
        for name, half, body in (("exact_key", key, self.key), ("exact_value", value, self.value)):
            wanted = (key.pages, self.kv_heads, self.page_size, body.head_dim)
            given = (half.pages, half.kv_heads, half.page_size, half.head_dim)
            if given != wanted:
                raise ValueError(
                    f"{name}: expected [exact pages, kv_heads, page_size, head_dim], {wanted}, "
                    f"got {given}"
                )
            if half.spec.rotation != body.spec.rotation or not half.spec.dynamic:
                raise ValueError(
                    f"{name}: expected dynamic codes in the basis of the body, rotation "
                    f"{body.spec.rotation!r}, got {half.spec}"
                )
            if half.codes.device != self.device:
                raise ValueError(
                    f"{name}: expected it on {self.device} as the codes, got {half.codes.device}"
                )

    def _check_exact(self, name: str, plane: Tensor, width: int, key: Tensor) -> None:
        pages = key.shape[0] if key.ndim else 0
        wanted = (pages, self.kv_heads, self.page_size, width)
        if tuple(plane.shape) != wanted:
            raise ValueError(
                f"{name}: expected [exact pages, kv_heads, page_size, head_dim], {wanted}, "
                f"got {tuple(plane.shape)}"
            )
        if plane.dtype not in _FLOATS or plane.dtype != key.dtype:
            raise ValueError(
                f"{name}: expected the dtype of a model, one for both, got {plane.dtype}"
            )
        if plane.device != self.device:
            raise ValueError(
                f"{name}: expected it on {self.device} as the codes, got {plane.device}"
            )
        _check_strides(name, plane)

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

    @property
    def out_rotated(self) -> bool:
        """Whether outputs leave attention in a rotated basis: that of what is summed."""
        summed = self.key if self.latent else self.value
        return summed.spec.rotation == "hadamard"

    def turned(self, q: Tensor) -> Tensor:
        """Queries, [.., query_dim], in the basis of the cached keys, in at least float32 where
        anything is done to them.
        """
        if self.key_map is not None:
            q = self.key_map.queries(q)
        if not self.latent:
            return _rotated(q, self.key.spec)
        if "hadamard" not in (self.key.spec.rotation, self.value.spec.rotation):
            return q
        parts = q.split([self.key.head_dim, self.value.head_dim], -1)
        halves = zip(parts, (self.key, self.value), strict=True)
        return torch.cat([_rotated(part, half.spec) for part, half in halves], -1)

    @property
    def _near(self) -> tuple[QuantSpec, QuantSpec] | None:
        key, value = self.exact_key, self.exact_value
        if isinstance(key, QuantizedPages) and isinstance(value, QuantizedPages):
            return key.spec, value.spec
        return None

    def retire(self) -> None:
        """Say that the pages have moved: an op that is given this view refuses it from now on."""
        object.__setattr__(self, "_retired", True)
        object.__setattr__(self, "_facts", None)

    @property
    def facts(self) -> LayerFacts:
        """What checks ask of the layer. ValueError for a view of before its cache grew."""
        if self._facts is None:
            if self._retired:
                raise ValueError(
                    "layer: expected the view that the cache hands out now, got one of before it "
                    "grew, whose pages are not the cache's any more"
                )
            made = _facts_of(
                self.key.pages,
                self.kv_heads,
                self.page_size,
                self.key.head_dim,
                self.value.head_dim,
                self.key.spec,
                self.value.spec,
                self.key.codes.dtype,
                _count(self.exact_key),
                self._near,
                self.device,
                self.latent,
            )
            object.__setattr__(self, "_facts", made)
            return made
        return self._facts

    @property
    def static(self) -> tuple[ScalePair, ScalePair]:
        """((key scale, key zero), (value scale, value zero)) where they were given,
        [kv_heads or 1, groups] each, as ``PagedKVCache.add_layer`` takes them."""
        key, value = self.key, self.value
        return (
            (None, None) if key.spec.dynamic else (key.scale, key.zero),
            (None, None) if value.spec.dynamic else (value.scale, value.zero),
        )

    def exact(self) -> "LayerKV":
        """The exact pages as a layer of their own."""
        return self._split()[1]

    def body(self) -> "LayerKV":
        """The codes alone."""
        return self._split()[0]

    def _split(self) -> "tuple[LayerKV, LayerKV]":
        """Made once: every step asks."""
        if self._parts is None:
            assert self.exact_key is not None and self.exact_value is not None
            near = LayerKV(
                _as_pages(self.exact_key), _as_pages(self.exact_value), latent=self.latent
            )
            body = LayerKV(self.key, self.value, key_map=self.key_map, latent=self.latent)
            parts = (body, near)
            object.__setattr__(self, "_parts", parts)
            return parts
        return self._parts


def _rotated(q: Tensor, spec: QuantSpec) -> Tensor:
    if spec.rotation != "hadamard":
        return q
    return rotate(q if q.dtype == torch.float64 else q.float())


def _as_pages(kept: Tensor | QuantizedPages) -> QuantizedPages:
    return kept if isinstance(kept, QuantizedPages) else QuantizedPages(_UNQUANTIZED, kept)


def _count(kept: Tensor | QuantizedPages | None) -> int | None:
    return None if kept is None else _as_pages(kept).pages
