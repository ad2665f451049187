"""The pages that rows live in, and who holds them: one memory may serve several caches.

Layers whose queries see equally far back (cache/reach) share page tables, a pool and a store: a
shelf. A model whose layers all see everything has one, one with windows in some layers has two.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from quantpage.cache import CacheLayout, LayerKV, PagedKVCache, PagePool, Reach, Sequence
from quantpage.cache.ledger import Ledger
from quantpage.cache.reach import most_pages
from quantpage.errors import CacheError
from quantpage.formats import KeyMap
from quantpage.formats.scales import ScalePair


@dataclass(frozen=True, slots=True)
class Basis:
    """What codes of a layer are read by besides its layout."""

    static: tuple[ScalePair, ScalePair] | None = None
    """Scales that were given, of a static format."""
    key_map: KeyMap | None = None


_GROWTH = 32
"""A pool that is full grows by what is needed, or by one page in so many: a page more costs every
page a copy, which is little beside the attention that reads them all at every token."""


class Shelf:
    """Pages of the layers of one reach."""

    def __init__(self, reach: Reach, page_size: int, exact: bool, ledger: Ledger) -> None:
        self.reach, self.page_size = reach, page_size
        self.pool = PagePool(0, ledger)
        self.exact_pool = PagePool(0, ledger) if exact else None
        """None: no layer's format keeps exact pages."""
        self.store = PagedKVCache()

    def new_sequence(self) -> Sequence:
        """A request without tokens."""
        return Sequence(self.pool, self.page_size, self.exact_pool, self.reach)

    @property
    def size(self) -> tuple[int, int]:
        """Pages and exact pages that are allocated."""
        return self.store.pages, self.store.exact_pages

    def held(self, sequences: Iterable[Sequence]) -> tuple[set[int], set[int]]:
        """Pages and exact pages that some of ``sequences`` holds."""
        found: tuple[set[int], set[int]] = (set(), set())
        for each in sequences:
            found[0].update(each.pages)
            found[1].update(each.exact_pages)
        for pages in found:
            pages.discard(-1)
        return found

    def largest_layer(self) -> int:
        """Bytes of the layer that takes most."""
        return max((self._layer_bytes(each) for each in self.store.layouts.values()), default=0)

    def _layer_bytes(self, layout: CacheLayout) -> int:
        pages, exact_pages = self.size
        return pages * layout.bytes_per_page() + exact_pages * layout.exact_bytes_per_page()

    def resize(self) -> None:
        """As many pages in the store as the pools have."""
        if self.store.device.type == "cuda":
            # What other streams still write would be lost in the copy.
            torch.cuda.synchronize(self.store.device)
        exact = 0 if self.exact_pool is None else self.exact_pool.capacity
        self.store.grow(self.pool.capacity - self.store.pages, exact - self.store.exact_pages)


class Memory:
    """Pages of every layer with their pools, grown on demand.

    Pages are allocated outside of inference mode, whoever asks, so that a cache may be continued
    inside and outside of it.
    """

    def __init__(
        self, page_size: int, kinds: Mapping[Reach, bool], max_tokens: int | None = None
    ) -> None:
        """kinds: the reaches of the model's layers, each with whether one of its layers' formats
        keeps exact pages. max_tokens: that a row will have at most; None: not known."""
        self.page_size, self.max_tokens = page_size, max_tokens
        self.ledger = Ledger()
        """Of the pools and all who hold their pages."""
        self.shelves = {
            reach: Shelf(reach, page_size, exact, self.ledger) for reach, exact in kinds.items()
        }
        self._of_layer: dict[int, Shelf] = {}
        self._peak = 0

    @property
    def layouts(self) -> dict[int, CacheLayout]:
        """Of the layers that are there so far."""
        return {index: shelf.store.layouts[index] for index, shelf in self._of_layer.items()}

    @torch.inference_mode(False)
    def add_layer(
        self,
        index: int,
        layout: CacheLayout,
        reach: Reach,
        device: torch.device,
        basis: Basis = Basis(),
    ) -> None:
        """Allocate a layer, unless another cache has; CacheError where its layout was another.

        Pages that are there keep their basis: what they hold was written by it.
        """
        shelf = self._of_layer.get(index)
        if shelf is None:
            if not self._of_layer:
                for each in self.shelves.values():
                    each.store = PagedKVCache(*each.size, device)
            shelf = self.shelves[reach]
            shelf.store.add_layer(index, layout, basis.static, basis.key_map)
            self._of_layer[index] = shelf
        elif shelf.store.layouts[index] != layout:
            raise CacheError(
                f"layer {index}: expected pages of {shelf.store.layouts[index]}, got {layout}"
            )

    def fill(self, stores: Mapping[Reach, PagedKVCache]) -> None:
        """Take over pages that nobody holds yet, such as those of a file."""
        for reach, store in stores.items():
            shelf = self.shelves[reach]
            shelf.store = store
            shelf.pool.grow(store.pages)
            if shelf.exact_pool is not None:
                shelf.exact_pool.grow(store.exact_pages)
            self._of_layer |= dict.fromkeys(store.layouts, shelf)

    def layer(self, index: int) -> LayerKV:
        """The pages of one layer."""
        return self._of_layer[index].store.layer(index)

    @property
    def size(self) -> tuple[tuple[int, int], ...]:
        """Pages that are allocated; another size means that tensors moved."""
        return tuple(shelf.size for shelf in self.shelves.values())

    @torch.inference_mode(False)
    def make_room(self, shelf: Shelf, pages: int, exact_pages: int, rows: int = 0) -> None:
        """Grow until so many pages of a shelf are free, or not at all.

        rows: that ask for them; where it is known how long they will be, all that they will take
        is made at once.
        """
        self.ledger.whole(self._make_room, shelf, pages, exact_pages, rows)

    def _make_room(self, shelf: Shelf, pages: int, exact_pages: int, rows: int) -> None:
        most = (0, 0)
        if self.max_tokens is not None:
            most = most_pages(shelf.reach, self.max_tokens, self.page_size)
        moved = False
        for pool, need, each in (
            (shelf.pool, pages, most[0]),
            (shelf.exact_pool, exact_pages, most[1]),
        ):
            if pool is not None and need > pool.free:
                more = need - pool.free, pool.capacity // _GROWTH, each * rows - pool.capacity
                pool.grow(max(more))
                moved = True
        if moved:
            standing = self.allocated_bytes()
            shelf.resize()
            # The layer that is copied last is there twice, the others are grown by then.
            self.note_peak(min(standing, shelf.largest_layer()))

    @torch.inference_mode(False)
    def trim(self) -> int:
        """Give back the pages after the last that is held, in every layer; bytes given back."""
        with self.ledger.lock:
            return self._trim()

    def _trim(self) -> int:
        # Not whole: a pool may be smaller than its store, and never larger.
        before = self.allocated_bytes()
        self.note_peak()
        for shelf in self.shelves.values():
            shelf.pool.trim()
            if shelf.exact_pool is not None:
                shelf.exact_pool.trim()
            shelf.resize()
        return before - self.allocated_bytes()

    def used_bytes(self) -> int:
        """Bytes of the pages that are held, whoever holds them."""
        self.ledger.settle()
        return sum(
            shelf.store.used_bytes(
                shelf.pool.used, 0 if shelf.exact_pool is None else shelf.exact_pool.used
            )
            for shelf in self.shelves.values()
        )

    def allocated_bytes(self) -> int:
        """Bytes of all pages, held or free."""
        return sum(shelf.store.nbytes for shelf in self.shelves.values())

    @property
    def peak_bytes(self) -> int:
        """The most that was allocated at once, growing and working pages (cache/working)
        counted."""
        return max(self._peak, self.allocated_bytes())

    def note_peak(self, beside: int = 0) -> None:
        """Before pages are given back, or while ``beside`` bytes are there beside them."""
        self._peak = max(self._peak, self.allocated_bytes() + beside)
