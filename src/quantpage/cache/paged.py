"""The owner of all cache tensors. Everything else sees views.

One page id means the same page in every layer, so that one page table a request serves all layers.
Layers may have different formats, heads and channels. Memory is zero-filled when it is
allocated: a code or scale that nobody wrote is a finite number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantpage.cache.counts import page_ids, whole
from quantpage.cache.layout import CacheLayout
from quantpage.cache.memory import zero_plane
from quantpage.cache.saved import SavedPages, read_pages, write_pages
from quantpage.cache.sequence import PageCopy
from quantpage.cache.tensor_file import shown, whole_number
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.errors import CacheError, CorruptCache
from quantpage.formats import KeyMap, QuantSpec
from quantpage.formats.scales import ScalePair

_NO_SCALES: tuple[ScalePair, ScalePair] = ((None, None), (None, None))


@dataclass(frozen=True, slots=True)
class HostPages:
    """Pages of every layer, copied to the host."""

    planes: dict[str, Tensor]
    """By layer and plane, "3.key.codes": [pages, ...] each."""
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
        self.pages, self.exact_pages = whole("pages", pages), whole("exact_pages", exact_pages)
        self.device = torch.device(device)
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

        static: ((key scale, key zero), (value scale, value zero)) for static formats, each
        [kv_heads or 1, groups], None where there is none. key_map: what is done to keys before
        they are cached. Raises CacheError for an index that is there, ValueError for scales that
        do not belong to the layout.
        """
        index = whole("index", index)
        if index in self.layouts:
            raise CacheError(f"layer {index}: expected a new index, it is there already")
        if not layout.format.dynamic and static is None:
            raise ValueError(
                f"static: expected scales for the static format {layout.format.name}, got None"
            )
        made = allocate_layer(layout, self.pages, self.exact_pages, self.device, static)
        self._layers[index] = replace(made, key_map=key_map)
        self.layouts[index] = layout

    def layer(self, index: int) -> LayerKV:
        """The pages of one layer; the view is stale after ``grow``. CacheError for a layer that
        is not there."""
        found = self._layers.get(index)
        if found is None:
            raise CacheError(f"index: expected a layer of {list(self._layers)}, got {index!r}")
        return found

    def grow(self, pages: int, exact_pages: int = 0) -> None:
        """Add pages after the last; contents are kept, views of before are stale.

        Negative numbers take the last pages away, as far as there are some. Layers change one after
        the other, so that no more than one of them is in memory twice.
        """
        pages = whole("pages", pages, -self.pages) + self.pages
        exact_pages = whole("exact_pages", exact_pages, -self.exact_pages) + self.exact_pages
        for index, view in self._layers.items():
            self._layers[index] = replace(
                view,
                key=_resized(view.key, pages),
                value=_resized(view.value, pages),
                exact_key=_kept_resized(view.exact_key, exact_pages),
                exact_value=_kept_resized(view.exact_value, exact_pages),
            )
            view.retire()
        self.pages, self.exact_pages = pages, exact_pages

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Copy whole pages in every layer, in the order given. ValueError for pages that are not
        there, with nothing copied."""
        copies = list(copies)
        for copy in copies:
            self._check_pages("copies", (copy.source, copy.target), copy.exact)
        for copy in copies:
            for view in self._layers.values():
                for plane in _exact_planes(view) if copy.exact else _paged_planes(view):
                    plane[copy.target] = plane[copy.source]

    def swap_out(self, pages: Sequence[int], exact_pages: Sequence[int] = ()) -> HostPages:
        """Copy pages of every layer to the host; whoever holds the pages releases them.

        Raises ValueError for pages that are not there.
        """
        chosen = self._chosen(pages, exact_pages)
        planes = {}
        for index, view in self._layers.items():
            for group, ids in chosen.items():
                for name, plane in _named_planes(view)[group].items():
                    planes[f"{index}.{name}"] = plane[ids].cpu()
        return HostPages(planes, len(chosen["pages"]), len(chosen["exact_pages"]))

    def swap_in(
        self, host: HostPages, pages: Sequence[int], exact_pages: Sequence[int] = ()
    ) -> None:
        """Copy ``host``'s pages to the pages given, in the order in which they were taken.

        Raises ValueError, with nothing changed, for another number of pages than were taken, pages
        that are not there or given twice, and pages of a cache of other layers.
        """
        for name, taken, given in (
            ("pages", host.pages, len(pages)),
            ("exact_pages", host.exact_pages, len(exact_pages)),
        ):
            if taken != given:
                raise ValueError(f"{name}: expected {taken}, as were swapped out; got {given}")
        chosen = self._chosen(pages, exact_pages)
        for name, ids in chosen.items():
            if len(set(ids)) < len(ids):
                raise ValueError(f"{name}: expected each page once, got {ids}")
        # All of them are looked at before one is written.
        targets = [
            (f"{index}.{name}", plane, ids)
            for index, view in self._layers.items()
            for group, ids in chosen.items()
            for name, plane in _named_planes(view)[group].items()
        ]
        self._check_host(host, targets)
        for name, plane, ids in targets:
            plane[ids] = host.planes[name].to(plane.device)

    def _chosen(self, pages: Sequence[int], exact_pages: Sequence[int]) -> dict[str, list[int]]:
        return {
            "pages": self._check_pages("pages", pages, exact=False),
            "exact_pages": self._check_pages("exact_pages", exact_pages, exact=True),
        }

    def _check_pages(self, name: str, pages: Iterable[int], exact: bool) -> list[int]:
        return page_ids(name, pages, self.exact_pages if exact else self.pages)

    def _check_host(self, host: HostPages, targets: list[tuple[str, Tensor, list[int]]]) -> None:
        """ValueError unless ``host`` has the planes of these layers, alike but for their pages."""
        strange = host.planes.keys() - {name for name, _, _ in targets} - self.basis().keys()
        if strange:
            raise ValueError(
                f"host: expected pages of layers {list(self._layers)}, got {min(strange)} besides"
            )
        for name, plane, ids in targets:
            given = host.planes.get(name)
            wanted = (len(ids), *plane.shape[1:])
            if given is None or given.shape != wanted or given.dtype != plane.dtype:
                got = "none" if given is None else f"{given.dtype} {tuple(given.shape)}"
                raise ValueError(f"host: expected {name} as {plane.dtype} {wanted}, got {got}")

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
        pages = range(self.pages) if pages is None else pages
        exact_pages = range(self.exact_pages) if exact_pages is None else exact_pages
        sizes = {"pages": len(pages), "exact_pages": len(exact_pages), "user": note or {}}
        counts = dict.fromkeys(self.layouts, (len(pages), len(exact_pages)))
        planes = self.to_save(pages, exact_pages)
        write_pages(path, SavedPages(self.layouts, counts, planes, sizes))

    def to_save(self, pages: Sequence[int], exact_pages: Sequence[int]) -> dict[str, Tensor]:
        """What a file keeps of every layer, by name: its pages, [pages, ...], and its basis."""
        return {**self.swap_out(pages, exact_pages).planes, **self.basis()}

    def basis(self) -> dict[str, Tensor]:
        """What pages are read by, by name: static scales, [kv_heads or 1, groups], and key maps."""
        return {
            f"{index}.{name}": plane
            for index, view in self._layers.items()
            for name, plane in _named_planes(view)["static"].items()
        }

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        expected: Mapping[int, CacheLayout] | None = None,
    ) -> tuple["PagedKVCache", dict[str, Any]]:
        """A cache with the saved pages, numbered from 0, and the note saved with them.

        expected: the layouts that the caller's model needs. Raises CorruptCache for a file that
        is truncated, altered, or of another format, CacheError for one that cannot be read.
        """
        saved = read_pages(path, expected)
        note = saved.note
        if set(note) != {"pages", "exact_pages", "user"} or type(note["user"]) is not dict:
            raise CorruptCache(f"{path}: expected the note of a PagedKVCache, got {shown(note)}")
        sizes = (note["pages"], note["exact_pages"])
        if not all(map(whole_number, sizes)) or any(
            each != sizes for each in saved.counts.values()
        ):
            raise CorruptCache(f"{path}: expected as many pages as its layers have, got {sizes}")
        cache = cls(*sizes, device)
        cache.fill(saved.layouts, saved.planes)
        return cache, note["user"]

    def fill(self, layouts: Mapping[int, CacheLayout], planes: dict[str, Tensor]) -> None:
        """Add these layers with what ``to_save`` gave of them, as many pages as there are here.

        planes: [pages, ...] each, by the names that ``to_save`` gave; those of other layers are
        left alone. Raises CorruptCache for scales and key maps that cannot be.
        """
        for index, layout in layouts.items():
            pair = [
                _static_pair(planes, f"{index}.{half}", spec, self.device)
                for half, spec in (("key", layout.format.key), ("value", layout.format.value))
            ]
            try:
                key_map = _key_map(planes, index, self.device)
                self.add_layer(index, layout, (pair[0], pair[1]), key_map)
            except ValueError as error:
                raise CorruptCache(f"layer {index}: {error}") from error
        own = {name: x for name, x in planes.items() if layer_of(name) in self.layouts}
        host = HostPages(own, self.pages, self.exact_pages)
        self.swap_in(host, range(self.pages), range(self.exact_pages))

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


def allocate_layer(
    layout: CacheLayout,
    pages: int,
    exact_pages: int,
    device: torch.device | str,
    static: tuple[ScalePair, ScalePair] | None = None,
) -> LayerKV:
    """Zero-filled pages of one layer; exact ones where its format keeps some."""
    key, value = _allocate_halves(layout, pages, device, static or _NO_SCALES)
    near = layout.near
    if near is None:
        return LayerKV(key, value, latent=layout.latent)
    halves = _allocate_halves(near, exact_pages, device, _NO_SCALES)
    exact = halves if near.format.quantized else (halves[0].codes, halves[1].codes)
    return LayerKV(key, value, exact[0], exact[1], latent=layout.latent)


def _allocate_halves(
    layout: CacheLayout,
    pages: int,
    device: torch.device | str,
    static: tuple[ScalePair, ScalePair],
) -> tuple[QuantizedPages, QuantizedPages]:
    halves: list[QuantizedPages] = []
    form = layout.format
    for spec, width, given in (
        (form.key, layout.head_dim, static[0]),
        (form.value, layout.v_dim, static[1]),
    ):
        shape = layout.codes_shape(spec, width, pages)
        codes = zero_plane(shape, spec.code.storage or layout.dtype, device)
        if spec.dynamic and any(plane is not None for plane in given):
            raise ValueError(
                f"static: expected None where {form.name} computes its scales, got a tensor"
            )
        if spec.quantized and spec.dynamic:
            shape = layout.scale_shape(spec, width, pages)
            scale = zero_plane(shape, spec.scale_dtype, device)
            zero = zero_plane(shape, spec.scale_dtype, device) if spec.zero_point else None
            halves.append(QuantizedPages(spec, codes, scale, zero))
        else:
            _refuse_numbers(given)
            halves.append(QuantizedPages(spec, codes, *given))
    return halves[0], halves[1]


def _refuse_numbers(given: ScalePair) -> None:
    """ValueError for scales that are given and no scale can be."""
    for name, plane in zip(("scale", "zero"), given, strict=True):
        if plane is None:
            continue
        if not isinstance(plane, Tensor):
            raise ValueError(f"static: expected a tensor as {name}, got {type(plane).__name__}")
        bad = ~plane.isfinite() if name == "zero" else ~(plane.isfinite() & (plane > 0))
        if bad.any():
            wanted = "finite numbers" if name == "zero" else "finite numbers above 0"
            raise ValueError(f"static: expected {wanted} as {name}, got {plane[bad][0].item()}")


def layer_of(name: str) -> int:
    """The layer of a plane that ``to_save`` named."""
    return int(name.partition(".")[0])


def copy_rows(
    source: LayerKV, target: LayerKV, pairs: tuple[Tensor, Tensor], exact: bool = False
) -> None:
    """Copy pages of one layer to pages of another of the same layout: (from, to) page ids."""
    group = "exact_pages" if exact else "pages"
    given, into = _named_planes(source)[group], _named_planes(target)[group]
    for name, plane in into.items():
        plane[pairs[1]] = given[name][pairs[0]]


def _paged_planes(view: LayerKV) -> list[Tensor]:
    """Every tensor of the layer whose first dimension is pages."""
    return list(_named_planes(view)["pages"].values())


def _exact_planes(view: LayerKV) -> list[Tensor]:
    return list(_named_planes(view)["exact_pages"].values())


def _named_planes(view: LayerKV) -> dict[str, dict[str, Tensor]]:
    """The layer's tensors by name, as torch can index them, in three groups by first dimension."""
    pages: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    static: dict[str, Tensor] = {}
    for name, half in (("key", view.key), ("value", view.value)):
        pages[f"{name}.codes"] = _indexable(half.codes)
        (pages if half.spec.dynamic else static).update(_named(name, half, "scale", "zero"))
    for name, kept in (("exact_key", view.exact_key), ("exact_value", view.exact_value)):
        if isinstance(kept, QuantizedPages):
            exact[f"{name}.codes"] = _indexable(kept.codes)
            exact.update(_named(name, kept, "scale", "zero"))
        elif kept is not None:
            exact[name] = kept
    if view.key_map is not None:
        static.update(_named("key_map", view.key_map, "scale", "mean", "feedback", "turn"))
    return {"pages": pages, "exact_pages": exact, "static": static}


def _named(prefix: str, owner: QuantizedPages | KeyMap, *names: str) -> dict[str, Tensor]:
    """Those of the owner's tensors that it has, by name."""
    found = {name: getattr(owner, name) for name in names}
    return {f"{prefix}.{name}": plane for name, plane in found.items() if plane is not None}


def _key_map(planes: Mapping[str, Tensor], index: int, device: torch.device | str) -> KeyMap | None:
    scale = planes.get(f"{index}.key_map.scale")
    if scale is None:
        return None
    others = (planes.get(f"{index}.key_map.{name}") for name in ("mean", "feedback", "turn"))
    return KeyMap(scale, *others).to(device)


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


def _kept_resized(
    kept: Tensor | QuantizedPages | None, pages: int
) -> Tensor | QuantizedPages | None:
    if kept is None:
        return None
    if isinstance(kept, QuantizedPages):
        return _resized(kept, pages)
    return _of_pages(kept, pages)


def _resized(half: QuantizedPages, pages: int) -> QuantizedPages:
    scale, zero = half.scale, half.zero
    if half.spec.quantized and half.spec.dynamic:
        scale, zero = (
            None if plane is None else _of_pages(plane, pages) for plane in (scale, zero)
        )
    return QuantizedPages(half.spec, _of_pages(half.codes, pages), scale, zero)


def _of_pages(plane: Tensor, pages: int) -> Tensor:
    """The plane with so many pages; what both have is kept."""
    old = _indexable(plane)
    if old.shape[0] == pages:
        return plane
    new = zero_plane((pages, *old.shape[1:]), old.dtype, old.device)
    both = min(pages, old.shape[0])
    new[:both] = old[:both]
    return new.view(plane.dtype)


def _indexable(plane: Tensor) -> Tensor:
    """torch does not index every 8-bit dtype, so those go as bytes."""
    return plane.view(torch.uint8) if plane.dtype == torch.float8_e4m3fn else plane
