"""Pages of an engine that owns its memory, as a ``LayerKV``: views, nothing is copied.

Such an engine (vLLM) promises so many contiguous bytes a page and kv_head, a cell, and asks nothing
of what lies in them. Ours holds, in this order,

    [K codes | V codes | K scales | K zeros | V scales | V zeros]

each with its page's tokens in order; a cell of exact pages holds [K | V] in the model's dtype, or
codes and scales in the same order where the format keeps them so (``KVFormat.near``). One plane
after the other keeps every plane 16-byte aligned, which a scale beside each row would not, and a
cell still belongs to one head: heads can be sent or sharded apart. Pages and heads may be any
distance from each other (padding, several layers in one page).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantpage.cache.layout import CacheLayout
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import QuantSpec
from quantpage.formats.scales import ScalePair

ALIGNMENT = 16
"""Bytes: what the widest load of a kernel and its bulk copies ask of an address."""

_NO_SCALES: tuple[ScalePair, ScalePair] = ((None, None), (None, None))


def cell_bytes(layout: CacheLayout) -> int:
    """Bytes of one page of one kv_head, codes with their scales and zeros."""
    return layout.bytes_per_page() // layout.kv_heads


def exact_cell_bytes(layout: CacheLayout) -> int:
    """Bytes of one exact page of one kv_head; 0 where the format keeps none."""
    return layout.exact_bytes_per_page() // layout.kv_heads


def layer_of_cells(
    cells: Tensor,
    layout: CacheLayout,
    static: tuple[ScalePair, ScalePair] | None = None,
    exact: Tensor | None = None,
) -> LayerKV:
    """Views of ``layout``'s pages over memory that somebody else owns.

    cells: uint8 [pages, kv_heads, cell_bytes(layout)], each cell contiguous.
    static: ((key scale, key zero), (value scale, value zero)) for static formats.
    exact: uint8 [exact pages, kv_heads, exact_cell_bytes(layout)], where the format keeps some.

    Raises ValueError where the memory does not fit the layout.
    """
    if (exact is not None) != (layout.format.exact_pages is not None):
        have = "None" if exact is None else "a tensor"
        wanted = "None" if layout.format.exact_pages is None else "a tensor"
        raise ValueError(f"exact: expected {wanted} for format {layout.format.name}, got {have}")
    if not layout.format.dynamic and static is None:
        raise ValueError(
            f"static: expected scales for the static format {layout.format.name}, got None"
        )
    key, value = _halves("cells", cells, layout, static or _NO_SCALES)
    if exact is None:
        return LayerKV(key, value, latent=layout.latent)
    exact_key, exact_value = exact_of_cells(exact, layout)
    return LayerKV(key, value, exact_key, exact_value, latent=layout.latent)


def exact_of_cells(
    exact: Tensor, layout: CacheLayout
) -> tuple[Tensor, Tensor] | tuple[QuantizedPages, QuantizedPages]:
    """(exact_key, exact_value) of a ``LayerKV`` over ``exact``, as ``layer_of_cells`` takes it."""
    near = layout.near
    if near is None:
        raise ValueError(
            f"layout: expected one of a format with exact pages, got {layout.format.name}"
        )
    halves = _halves("exact", exact, near, _NO_SCALES)
    return halves if near.format.quantized else (halves[0].codes, halves[1].codes)


def _halves(
    name: str, cells: Tensor, layout: CacheLayout, given: tuple[ScalePair, ScalePair]
) -> tuple[QuantizedPages, QuantizedPages]:
    """Keys and values of ``cells``."""
    _check(name, cells, layout.kv_heads, cell_bytes(layout))
    memory = _Planes(cells, layout.page_size)
    halves = (layout.format.key, layout.head_dim), (layout.format.value, layout.v_dim)
    codes = [
        memory.next(spec.code.stored(width), spec.code.storage or layout.dtype)
        for spec, width in halves
    ]
    key, value = (
        QuantizedPages(spec, plane, *_scales(memory, spec, width, scales))
        for (spec, width), plane, scales in zip(halves, codes, given, strict=True)
    )
    return key, value


def _scales(memory: "_Planes", spec: QuantSpec, width: int, given: ScalePair) -> ScalePair:
    """Scale and zero: in the cell, or given for all pages."""
    if not spec.quantized:
        return None, None
    if not spec.dynamic:
        return given
    groups = spec.granularity.groups(width)
    scale = memory.next(groups, spec.scale_dtype)
    return scale, memory.next(groups, spec.scale_dtype) if spec.zero_point else None


@dataclass(slots=True)
class _Planes:
    """Cuts planes off the front of cells."""

    cells: Tensor
    page_size: int
    used: int = 0
    """Bytes of a cell that are cut off."""

    def next(self, width: int, dtype: torch.dtype) -> Tensor:
        """[pages, kv_heads, page_size, width] of ``dtype``."""
        first = self.used
        self.used += self.page_size * width * dtype.itemsize
        plane = self.cells[..., first : self.used].view(dtype)
        return plane.unflatten(-1, (self.page_size, width))


def _check(name: str, cells: Tensor, kv_heads: int, size: int) -> None:
    """Whole cells, of the right size, apart from each other and aligned."""
    if cells.dtype != torch.uint8:
        raise ValueError(f"{name}: expected bytes (torch.uint8), got {cells.dtype}")
    if cells.ndim != 3 or tuple(cells.shape[1:]) != (kv_heads, size):
        raise ValueError(
            f"{name}: expected [pages, {kv_heads} kv_heads, {size} bytes], got {tuple(cells.shape)}"
        )
    if cells.stride(2) != 1:
        raise ValueError(f"{name}: expected the bytes of a cell side by side, got strides "
                         f"{cells.stride()}")  # fmt: skip
    for what, offset in (
        ("an address", cells.data_ptr()),
        ("pages", cells.stride(0) if cells.shape[0] > 1 else 0),
        ("kv_heads", cells.stride(1) if cells.shape[1] > 1 else 0),
    ):
        if offset % ALIGNMENT:
            apart = what if what == "an address" else f"{what} at a distance"
            raise ValueError(f"{name}: expected {apart} in whole {ALIGNMENT} bytes, got {offset}")
