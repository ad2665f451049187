"""Which pages are free, and how many hold on to each: plain Python, no tensors."""

from collections.abc import Callable, Iterable
from heapq import heappop, heappush

from quantpage.cache.counts import whole
from quantpage.cache.ledger import Ledger
from quantpage.errors import CacheError, OutOfPages


class PagePool:
    """Page ids 0 .. capacity - 1 with reference counts.

    The lowest free page is given first, so that what is held lies low and ``trim`` finds the rest.
    Every operation is whole (cache/ledger) and may be called from any thread. Raises ValueError for
    a capacity below 0.
    """

    def __init__(self, capacity: int, ledger: Ledger | None = None) -> None:
        """ledger: that of another pool, for pools whose pages the same requests hold."""
        capacity = whole("capacity", capacity)
        self.ledger, self._joined = Ledger() if ledger is None else ledger, ledger is not None
        self._references = [0] * capacity
        # A heap; None: to be read off the counts again.
        self._free: list[int] | None = list(range(capacity))
        self._watchers: list[Callable[[int], None]] = []

    def join(self, other: "PagePool") -> None:
        """Be written down in the other pool's ledger from now on: the same requests hold both.

        Raises CacheError where this pool is joined to a third one.
        """
        if self.ledger is other.ledger:
            return
        if self._joined:
            raise CacheError("exact_pool: expected one that is used beside one pool, got a second")
        self.ledger, self._joined = other.ledger, True

    @property
    def capacity(self) -> int:
        """Pages in all."""
        return len(self._references)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        with self.ledger.lock:
            return len(self._heap())

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.capacity - self.free

    def acquire(self) -> int:
        """A free page, held once. Raises OutOfPages."""
        return self.acquire_all(1)[0]

    def acquire_all(self, pages: int) -> list[int]:
        """So many free pages, each held once. Raises OutOfPages with nothing changed."""
        return self.ledger.whole(self._acquire, whole("pages", pages))

    def share(self, page: int) -> int:
        """Hold ``page`` once more; returns it."""
        self.share_all((page,))
        return page

    def share_all(self, pages: Iterable[int]) -> None:
        """Hold each of ``pages`` once more."""
        self.ledger.whole(self._share, pages)

    def release(self, page: int) -> bool:
        """Let go of ``page`` once; True when it became free."""
        return self.release_all((page,)) == 1

    def release_all(self, pages: Iterable[int]) -> int:
        """Let go of each of ``pages`` once; how many became free."""
        return self.ledger.whole(self._release, pages)

    def references(self, page: int) -> int:
        """How often ``page`` is held."""
        return self._references[page]

    def grow(self, pages: int) -> None:
        """Add ``pages`` free pages after the last."""
        self.ledger.whole(self._grow, whole("pages", pages))

    def trim(self) -> int:
        """Take away the free pages after the last that is held; how many they were."""
        return self.ledger.whole(self._trim)

    def watch(self, watcher: Callable[[int], None]) -> None:
        """From now on ``watcher(page)`` is called whenever all holders of a page but one let go.

        Whoever holds pages for nobody in particular learns so when they may go, without asking.
        """
        self._watchers.append(watcher)

    def check(self) -> None:
        """Raise CacheError unless free pages and counts agree."""
        with self.ledger.lock:
            self._check()

    def _check(self) -> None:
        free = self._heap()
        if len(set(free)) != len(free):
            raise CacheError("pool: a page is free twice")
        for page in free:
            if self._references[page]:
                raise CacheError(f"pool: page {page} is free and held")
        held = sum(count > 0 for count in self._references)
        if held + len(free) != self.capacity:
            raise CacheError("pool: a page is neither free nor held")

    def _heap(self) -> list[int]:
        free = self._free
        if free is None:
            free = [page for page, count in enumerate(self._references) if not count]
            self._free = free
        return free

    def _acquire(self, pages: int) -> list[int]:
        free = self._heap()
        if pages > len(free):
            raise OutOfPages(
                f"pool: expected {pages} free pages, got {len(free)} of {self.capacity}"
            )
        self.ledger.note(self._reread)
        taken = []
        for _ in range(pages):
            page = heappop(free)
            self.ledger.note(self._restore, page, 0)
            self._references[page] = 1
            taken.append(page)
        return taken

    def _share(self, pages: Iterable[int]) -> None:
        note, counts = self.ledger.note, self._references
        for page in pages:
            count = self._held(page)
            note(self._restore, page, count)
            counts[page] = count + 1

    def _release(self, pages: Iterable[int]) -> int:
        note, counts, free, freed = self.ledger.note, self._references, self._heap(), 0
        note(self._reread)
        for page in pages:
            count = self._held(page)
            note(self._restore, page, count)
            counts[page] = count - 1
            if count == 1:
                heappush(free, page)
                freed += 1
            elif count == 2:
                for watcher in self._watchers:
                    watcher(page)
        return freed

    def _grow(self, pages: int) -> None:
        first, free = self.capacity, self._heap()
        self.ledger.note(self._resize, first)
        self._references.extend([0] * pages)
        # Higher than all there are: it stays a heap.
        free.extend(range(first, first + pages))

    def _trim(self) -> int:
        before = self.capacity
        held = (page for page in range(before - 1, -1, -1) if self._references[page])
        last = next(held, -1) + 1
        self.ledger.note(self._resize, before)
        self._resize(last)
        return before - last

    def _restore(self, page: int, count: int) -> None:
        self._references[page] = count

    def _reread(self) -> None:
        self._free = None

    def _resize(self, capacity: int) -> None:
        """Drop or add counts of free pages at the end."""
        self._free = None
        del self._references[capacity:]
        self._references.extend([0] * (capacity - len(self._references)))

    def _held(self, page: int) -> int:
        """The count of a page that is held; CacheError for any other."""
        if not 0 <= page < len(self._references) or self._references[page] == 0:
            raise CacheError(f"page: expected one that is held, got {page}")
        return self._references[page]
