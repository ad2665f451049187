"""Which pages are free, and how many hold on to each: plain Python, no tensors."""

from heapq import heapify, heappop, heappush

from quantpage.errors import CacheError, OutOfPages


class PagePool:
    """Page ids 0 .. capacity - 1 with reference counts.

    The lowest free page is given first, so that what is held lies low and ``trim`` finds the rest.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"capacity: expected at least 0 pages, got {capacity}")
        self._references = [0] * capacity
        # A heap.
        self._free = list(range(capacity))

    @property
    def capacity(self) -> int:
        """Pages in all."""
        return len(self._references)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.capacity - self.free

    def acquire(self) -> int:
        """A free page, held once. Raises OutOfPages."""
        if not self._free:
            raise OutOfPages(f"pool: expected a free page, all {self.capacity} are held")
        page = heappop(self._free)
        self._references[page] = 1
        return page

    def share(self, page: int) -> int:
        """Hold ``page`` once more; returns it."""
        self._check_held(page)
        self._references[page] += 1
        return page

    def release(self, page: int) -> bool:
        """Let go of ``page`` once; True when it became free."""
        self._check_held(page)
        self._references[page] -= 1
        if self._references[page]:
            return False
        heappush(self._free, page)
        return True

    def references(self, page: int) -> int:
        """How often ``page`` is held."""
        return self._references[page]

    def grow(self, pages: int) -> None:
        """Add ``pages`` free pages after the last."""
        first = self.capacity
        self._references.extend([0] * pages)
        # Higher than all there are: it stays a heap.
        self._free.extend(range(first, first + pages))

    def trim(self) -> int:
        """Take away the free pages after the last that is held; how many they were."""
        before = self.capacity
        while self._references and not self._references[-1]:
            self._references.pop()
        if self.capacity < before:
            self._free = [page for page in self._free if page < self.capacity]
            heapify(self._free)
        return before - self.capacity

    def check(self) -> None:
        """Raise CacheError unless free pages and counts agree."""
        if len(set(self._free)) != len(self._free):
            raise CacheError("pool: a page is free twice")
        for page in self._free:
            if self._references[page]:
                raise CacheError(f"pool: page {page} is free and held")
        held = sum(count > 0 for count in self._references)
        if held + len(self._free) != self.capacity:
            raise CacheError("pool: a page is neither free nor held")

    def _check_held(self, page: int) -> None:
        if not 0 <= page < self.capacity or self._references[page] == 0:
            raise CacheError(f"page: expected one that is held, got {page}")
