"""The pages that rows live in, and who holds them: one memory may serve several caches."""

import torch

from quantpage.cache import CacheLayout, PagedKVCache, PagePool, Sequence
from quantpage.errors import CacheError


class Memory:
    """Pages of every layer with their pools, grown on demand.

    Pages are allocated outside of inference mode, whoever asks, so that a cache may be continued
    inside and outside of it.
    """

    def __init__(self, page_size: int, exact: bool) -> None:
        self.page_size = page_size
        self.pool = PagePool(0)
        self.exact_pool = PagePool(0) if exact else None
        """None: no layer's format keeps exact pages."""
        self.store: PagedKVCache | None = None

    @property
    def layouts(self) -> dict[int, CacheLayout]:
        """Of the layers that are there so far."""
        return {} if self.store is None else self.store.layouts

    @torch.inference_mode(False)
    def add_layer(self, index: int, layout: CacheLayout, device: torch.device) -> None:
        """Allocate a layer, unless another cache has; CacheError where its layout was another."""
        if self.store is None:
            self.store = PagedKVCache(device=device)
        found = self.layouts.get(index)
        if found is None:
            self.store.add_layer(index, layout)
        elif found != layout:
            raise CacheError(f"layer {index}: expected pages of {found}, got {layout}")

    @property
    def size(self) -> tuple[int, int]:
        """Pages and exact pages that are allocated; another size means that tensors moved."""
        return (0, 0) if self.store is None else (self.store.pages, self.store.exact_pages)

    def new_sequence(self) -> Sequence:
        """A request without tokens."""
        return Sequence(self.pool, self.page_size, self.exact_pool)

    @torch.inference_mode(False)
    def make_room(self, pages: int, exact_pages: int) -> None:
        """Grow until so many pages are free."""
        assert self.store is not None
        more = _growth(self.pool, pages)
        more_exact = 0 if self.exact_pool is None else _growth(self.exact_pool, exact_pages)
        if more or more_exact:
            self.store.grow(more, more_exact)
            self.pool.grow(more)
            if self.exact_pool is not None:
                self.exact_pool.grow(more_exact)

    def fill(self, store: PagedKVCache) -> None:
        """Take over pages that nobody holds yet, such as those of a file."""
        self.store = store
        self.pool.grow(store.pages)
        if self.exact_pool is not None:
            self.exact_pool.grow(store.exact_pages)

    def used_bytes(self) -> int:
        """Bytes of the pages that are held."""
        if self.store is None:
            return 0
        exact = 0 if self.exact_pool is None else self.exact_pool.used
        return self.store.used_bytes(self.pool.used, exact)


def _growth(pool: PagePool, need: int) -> int:
    """Pages to add so that ``need`` are free: half as many again as there are, at least 16."""
    if need <= pool.free:
        return 0
    return max(need - pool.free, pool.capacity // 2, 16)
