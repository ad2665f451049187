"""The owner of all cache tensors. Everything else sees views.

One page id means the same page in every layer, so that one page table a request serves all layers.
Layers may have different formats, heads and channels. Memory is zero-filled when it is
allocated: a code or scale that nobody wrote is a finite number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantpage.cache.layout import CacheLayout
from quantpage.cache.memory import zero_plane
from quantpage.cache.saved import SavedPages, read_pages, write_pages
from quantpage.cache.sequence import PageCopy
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.errors import CacheError
from quantpage.formats import KeyMap, QuantSpec
from quantpage.formats.scales import ScalePair


@dataclass(frozen=True, slots=True)
class HostPages:
    """Pages of every layer, copied to the host."""

    planes: dict[str, Tensor]
    """By layer and plane: "3.key.codes"."""
    pages: int
    exact_pages: int

    @property
    def nbytes(self) -> int:
        """Bytes they take."""
        return sum(plane.nbytes for plane in self.planes.values())


class PagedKVCache:
    """Pages of every layer, all of the same count."""

    def __init__(
        self, pages: int = 0, exact_pages: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.pages, self.exact_pages, self.device = pages, exact_pages, torch.device(device)
        self.layouts: dict[int, CacheLayout] = {}
        self._layers: dict[int, LayerKV] = {}

    def add_layer(
        self,
        index: int,
        layout: CacheLayout,
        static: tuple[ScalePair, ScalePair] | None = None,
        key_map: KeyMap | None = None,
    ) -> None:
        """Allocate layer ``index``.

        static: ((key scale, key zero), (value scale, value zero)) for static formats.
        key_map: what is done to keys before they are cached.
        """
        if index in self._layers:
            raise CacheError(f"layer {index}: expected a new index, it is there already")
        if not layout.format.dynamic and static is None:
            raise ValueError(
                f"static: expected scales for the static format {layout.format.name}, got None"
            )
        key_static, value_static = static or ((None, None), (None, None))
        exact = layout.format.exact_pages is not None
        self.layouts[index] = layout
        self._layers[index] = LayerKV(
            self._allocate(layout, layout.format.key, layout.head_dim, key_static),
            self._allocate(layout, layout.format.value, layout.v_dim, value_static),
            self._exact_plane(layout, layout.head_dim) if exact else None,
            self._exact_plane(layout, layout.v_dim) if exact else None,
            key_map,
        )

    def layer(self, index: int) -> LayerKV:
        """The pages of one layer; the view is stale after ``grow``."""
        return self._layers[index]

    def grow(self, pages: int, exact_pages: int = 0) -> None:
        """Add pages after the last; contents are kept, views of before are stale."""
        for index, view in self._layers.items():
            self._layers[index] = LayerKV(
                _grown(view.key, pages),
                _grown(view.value, pages),
                None if view.exact_key is None else _longer(view.exact_key, exact_pages),
                None if view.exact_value is None else _longer(view.exact_value, exact_pages),
                view.key_map,
            )
        self.pages += pages
        self.exact_pages += exact_pages

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Copy whole pages in every layer, in the order given."""
        for copy in copies:
            for view in self._layers.values():
                for plane in _exact_planes(view) if copy.exact else _paged_planes(view):
                    plane[copy.target] = plane[copy.source]

    def swap_out(self, pages: Sequence[int], exact_pages: Sequence[int] = ()) -> HostPages:
        """Copy pages of every layer to the host; whoever holds the pages releases them."""
        chosen = {"pages": list(pages), "exact_pages": list(exact_pages)}
        planes = {}
        for index, view in self._layers.items():
            for group, ids in chosen.items():
                for name, plane in _named_planes(view)[group].items():
                    planes[f"{index}.{name}"] = plane[ids].cpu()
        return HostPages(planes, len(chosen["pages"]), len(chosen["exact_pages"]))

    def swap_in(
        self, host: HostPages, pages: Sequence[int], exact_pages: Sequence[int] = ()
    ) -> None:
        """Copy ``host``'s pages to the pages given, in the order in which they were taken."""
        for name, taken, given in (
            ("pages", host.pages, len(pages)),
            ("exact_pages", host.exact_pages, len(exact_pages)),
        ):
            if taken != given:
                raise ValueError(f"{name}: expected {taken}, as were swapped out; got {given}")
        chosen = {"pages": list(pages), "exact_pages": list(exact_pages)}
        for index, view in self._layers.items():
            for group, ids in chosen.items():
                for name, plane in _named_planes(view)[group].items():
                    plane[ids] = host.planes[f"{index}.{name}"].to(plane.device)

    def save(
        self,
        path: Path | str,
        pages: Sequence[int] | None = None,
        exact_pages: Sequence[int] | None = None,
        note: dict[str, Any] | None = None,
    ) -> None:
        """Write pages of every layer to a file, whole or not at all (cache/saved).

        pages, exact_pages: which, in the order in which ``load`` numbers them; None: all.
        note: what to remember beside them (JSON), such as lengths and page tables.
        """
        host = self.swap_out(
            range(self.pages) if pages is None else pages,
            range(self.exact_pages) if exact_pages is None else exact_pages,
        )
        static = {
            f"{index}.{name}": plane
            for index, view in self._layers.items()
            for name, plane in _named_planes(view)["static"].items()
        }
        sizes = {"pages": host.pages, "exact_pages": host.exact_pages, "user": note or {}}
        write_pages(path, SavedPages(self.layouts, {**host.planes, **static}, sizes))

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        expected: Mapping[int, CacheLayout] | None = None,
    ) -> tuple["PagedKVCache", dict[str, Any]]:
        """A cache with the saved pages, numbered from 0, and the note saved with them.

        expected: the layouts that the caller's model needs. Raises CorruptCache for a file that
        is truncated, altered, or of another format.
        """
        saved = read_pages(path, expected)
        cache = cls(saved.note["pages"], saved.note["exact_pages"], device)
        for index, layout in saved.layouts.items():
            pair = [
                _static_pair(saved.planes, f"{index}.{half}", spec, device)
                for half, spec in (("key", layout.format.key), ("value", layout.format.value))
            ]
            cache.add_layer(
                index, layout, (pair[0], pair[1]), _key_map(saved.planes, index, device)
            )
        host = HostPages(saved.planes, cache.pages, cache.exact_pages)
        cache.swap_in(host, range(cache.pages), range(cache.exact_pages))
        return cache, saved.note["user"]

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return self.used_bytes(self.pages, self.exact_pages)

    def used_bytes(self, pages: int, exact_pages: int = 0) -> int:
        """Bytes that so many pages take in all layers."""
        return sum(
            pages * layout.bytes_per_page() + exact_pages * layout.exact_bytes_per_page()
            for layout in self.layouts.values()
        )

    def _allocate(self, layout, spec: QuantSpec, width: int, static) -> QuantizedPages:
        shape = layout.codes_shape(spec, width, self.pages)
        codes = zero_plane(shape, spec.code.storage or layout.dtype, self.device)
        if not spec.quantized or not spec.dynamic:
            return QuantizedPages(spec, codes, *static)
        shape = layout.scale_shape(spec, width, self.pages)
        scale = zero_plane(shape, spec.scale_dtype, self.device)
        zero = zero_plane(shape, spec.scale_dtype, self.device) if spec.zero_point else None
        return QuantizedPages(spec, codes, scale, zero)

    def _exact_plane(self, layout: CacheLayout, width: int) -> Tensor:
        shape = (self.exact_pages, layout.kv_heads, layout.page_size, width)
        return zero_plane(shape, layout.dtype, self.device)


def _paged_planes(view: LayerKV) -> list[Tensor]:
    """Every tensor of the layer whose first dimension is pages."""
    return list(_named_planes(view)["pages"].values())


def _exact_planes(view: LayerKV) -> list[Tensor]:
    return list(_named_planes(view)["exact_pages"].values())


def _named_planes(view: LayerKV) -> dict[str, dict[str, Tensor]]:
    """The layer's tensors by name, as torch can index them, in three groups by first dimension."""
    found: dict[str, dict[str, Tensor]] = {"pages": {}, "exact_pages": {}, "static": {}}
    for half, pages in (("key", view.key), ("value", view.value)):
        found["pages"][f"{half}.codes"] = _indexable(pages.codes)
        group = "pages" if pages.spec.dynamic else "static"
        for name, plane in (("scale", pages.scale), ("zero", pages.zero)):
            if plane is not None:
                found[group][f"{half}.{name}"] = plane
    for name, plane in (("exact_key", view.exact_key), ("exact_value", view.exact_value)):
        if plane is not None:
            found["exact_pages"][name] = plane
    if view.key_map is not None:
        found["static"]["key_map.scale"] = view.key_map.scale
        if view.key_map.mean is not None:
            found["static"]["key_map.mean"] = view.key_map.mean
    return found


def _key_map(planes: Mapping[str, Tensor], index: int, device: torch.device | str) -> KeyMap | None:
    scale = planes.get(f"{index}.key_map.scale")
    if scale is None:
        return None
    return KeyMap(scale, planes.get(f"{index}.key_map.mean")).to(device)


def _static_pair(
    planes: Mapping[str, Tensor], name: str, spec: QuantSpec, device: torch.device | str
) -> ScalePair:
    if spec.dynamic:
        return None, None
    scale, zero = planes.get(f"{name}.scale"), planes.get(f"{name}.zero")
    return (
        None if scale is None else scale.to(device),
        None if zero is None else zero.to(device),
    )


def _grown(half: QuantizedPages, pages: int) -> QuantizedPages:
    if half.spec.quantized and half.spec.dynamic:
        scale, zero = (
            None if plane is None else _longer(plane, pages) for plane in (half.scale, half.zero)
        )
    else:
        scale, zero = half.scale, half.zero
    return QuantizedPages(half.spec, _longer(half.codes, pages), scale, zero)


def _longer(plane: Tensor, pages: int) -> Tensor:
    old = _indexable(plane)
    new = zero_plane((old.shape[0] + pages, *old.shape[1:]), old.dtype, old.device)
    new[: old.shape[0]] = old
    return new.view(plane.dtype)


def _indexable(plane: Tensor) -> Tensor:
    """torch does not index every 8-bit dtype, so those go as bytes."""
    return plane.view(torch.uint8) if plane.dtype == torch.float8_e4m3fn else plane
