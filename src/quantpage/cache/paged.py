"""The owner of all cache tensors. Everything else sees views.

One page id means the same page in every layer, so that one page table a request serves all layers.
Layers may have different formats, heads and channels. Memory is zero-filled when it is
allocated: a code or scale that nobody wrote is a finite number.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from quantpage.cache.layout import CacheLayout
from quantpage.cache.sequence import PageCopy
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.errors import CacheError
from quantpage.formats import QuantSpec


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
        static: tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None,
    ) -> None:
        """Allocate layer ``index``.

        static: ((key scale, key zero), (value scale, value zero)) for static formats.
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
            )
        self.pages += pages
        self.exact_pages += exact_pages

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Copy whole pages in every layer, in the order given."""
        for copy in copies:
            for view in self._layers.values():
                for plane in _exact_planes(view) if copy.exact else _paged_planes(view):
                    plane[copy.target] = plane[copy.source]

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
        codes = torch.zeros(
            layout.codes_shape(spec, width, self.pages),
            dtype=spec.code.storage or layout.dtype,
            device=self.device,
        )
        if not spec.quantized or not spec.dynamic:
            return QuantizedPages(spec, codes, *static)
        shape = layout.scale_shape(spec, width, self.pages)
        scale = torch.zeros(shape, dtype=spec.scale_dtype, device=self.device)
        return QuantizedPages(
            spec, codes, scale, torch.zeros_like(scale) if spec.zero_point else None
        )

    def _exact_plane(self, layout: CacheLayout, width: int) -> Tensor:
        shape = (self.exact_pages, layout.kv_heads, layout.page_size, width)
        return torch.zeros(shape, dtype=layout.dtype, device=self.device)


def _paged_planes(view: LayerKV) -> list[Tensor]:
    """Every tensor of the layer whose first dimension is pages, as bytes."""
    planes = []
    for half in (view.key, view.value):
        planes.append(half.codes)
        if half.spec.quantized and half.spec.dynamic:
            planes += [plane for plane in (half.scale, half.zero) if plane is not None]
    return [_indexable(plane) for plane in planes]


def _exact_planes(view: LayerKV) -> list[Tensor]:
    return [plane for plane in (view.exact_key, view.exact_value) if plane is not None]


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
    new = old.new_zeros((old.shape[0] + pages, *old.shape[1:]))
    new[: old.shape[0]] = old
    return new.view(plane.dtype)


def _indexable(plane: Tensor) -> Tensor:
    """torch does not index every 8-bit dtype, so those go as bytes."""
    return plane.view(torch.uint8) if plane.dtype == torch.float8_e4m3fn else plane
