"""One request: how many tokens it has cached, and in which pages.

A step is ``reserve(n)`` (pages for n more tokens; copies that the owner of the tensors must make
first), the writes of all layers, and ``commit()``. Pages are shared between forks and copied when
one of them writes into a page that both hold.

    kept exact      page:   0    1    2    3    4    5
    between steps           x              x    x    x      first, the two before, the current
    during a step           x         x    x    x    x      and all that new tokens stand in
"""

from dataclasses import dataclass

from quantpage.cache.pool import PagePool
from quantpage.errors import CacheError, OutOfPages


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy page ``source`` to ``target`` before the step writes."""

    source: int
    target: int
    exact: bool = False
    """Of the exact pages, not of the codes."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Full pages that hold the beginning of a prompt (cache/prefix)."""

    pages: tuple[int, ...]
    exact_pages: tuple[int, ...] = ()
    """Logical page -> exact page or -1, the first and the last present; empty where the format
    keeps none."""


class Sequence:
    """One request's tokens and pages; see the module's picture."""

    def __init__(self, pool: PagePool, page_size: int, exact_pool: PagePool | None = None) -> None:
        self._pool, self._exact_pool, self.page_size = pool, exact_pool, page_size
        self.length = 0
        """Tokens that are cached and committed."""
        self.reserved = 0
        """Tokens of the step under way."""
        self.pages: list[int] = []
        self.exact_pages: list[int] = []
        """Logical page -> exact page or -1; empty where the format keeps none."""

    def pages_needed(self, tokens: int) -> tuple[int, int]:
        """(pages, exact pages) that ``reserve(tokens)`` would acquire now."""
        if tokens == 0:
            return 0, 0
        last = -(-(self.length + tokens) // self.page_size)
        need = last - len(self.pages) + self._shares_last(self.pages, self._pool)
        if self._exact_pool is None:
            return need, 0
        shared = self._shares_last(self.exact_pages, self._exact_pool)
        return need, last - len(self.exact_pages) + shared

    def reserve(self, tokens: int) -> list[PageCopy]:
        """Make room for ``tokens`` more; the copies to make before they are written.

        Raises OutOfPages with nothing changed.
        """
        if self.reserved:
            raise CacheError("reserve: expected the last step to be committed first")
        need, exact_need = self.pages_needed(tokens)
        if need > self._pool.free:
            self._pool_is_out("pool", self._pool, need)
        if self._exact_pool is not None and exact_need > self._exact_pool.free:
            self._pool_is_out("exact_pool", self._exact_pool, exact_need)
        if tokens == 0:
            return []
        copies = self._own(self.pages, self._pool, exact=False)
        last = -(-(self.length + tokens) // self.page_size)
        while len(self.pages) < last:
            self.pages.append(self._pool.acquire())
        if self._exact_pool is not None:
            copies += self._own(self.exact_pages, self._exact_pool, exact=True)
            while len(self.exact_pages) < last:
                self.exact_pages.append(self._exact_pool.acquire())
        self.reserved = tokens
        return copies

    def commit(self, tokens: int | None = None) -> None:
        """The step is written: count its tokens, let go of exact pages no query will see.

        tokens: how many of them count, from the first; None: all. The rest of a draft that is
        rejected here may be of any length (``crop`` comes too late for a long one).
        """
        accepted = self.reserved if tokens is None else tokens
        if not 0 <= accepted <= self.reserved:
            raise ValueError(f"tokens: expected 0..{self.reserved}, got {tokens}")
        self.length += accepted
        self.reserved = 0
        self._cut()
        self._trim_exact()

    def adopt(self, prefix: Prefix) -> None:
        """Begin with pages that another request wrote, already held for this one."""
        if self.length or self.reserved:
            raise CacheError(f"adopt: expected an empty sequence, got {self.length} tokens")
        self.pages = list(prefix.pages)
        self.length = len(self.pages) * self.page_size
        if self._exact_pool is not None and self.pages:
            exact = list(prefix.exact_pages)
            if len(exact) != len(self.pages) or exact[0] < 0 or exact[-1] < 0:
                raise CacheError(
                    f"adopt: expected the first and the last page's exact page, got {exact}"
                )
            self.exact_pages = exact

    def fork(self) -> "Sequence":
        """Another request with the same tokens, sharing every page."""
        if self.reserved:
            raise CacheError("fork: expected the last step to be committed first")
        made = Sequence(self._pool, self.page_size, self._exact_pool)
        made.length = self.length
        made.pages = [self._pool.share(page) for page in self.pages]
        if self._exact_pool is not None:
            made.exact_pages = [
                page if page < 0 else self._exact_pool.share(page) for page in self.exact_pages
            ]
        return made

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on.

        Raises CacheError when the exact page that the next query needs is no longer kept.
        """
        if self.reserved:
            raise CacheError("crop: expected the last step to be committed first")
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0..{self.length}, got {length}")
        keep = -(-length // self.page_size)
        # The next query reads its own page, where that holds tokens, and the one before it.
        seen = range(max(length // self.page_size - 1, 0), keep)
        gone = [page for page in seen if self.exact_pages and self.exact_pages[page] < 0]
        if gone:
            raise CacheError(
                f"crop: expected a length whose last pages are still kept exact, got {length}, "
                f"for which page {gone[0]} is not"
            )
        self.length = length
        self._cut()

    def free(self) -> None:
        """Let go of everything."""
        self.reserved = 0
        for page in self.pages:
            self._pool.release(page)
        for page in self.exact_pages:
            if page >= 0 and self._exact_pool is not None:
                self._exact_pool.release(page)
        self.pages, self.exact_pages, self.length = [], [], 0

    def _own(self, pages: list[int], pool: PagePool, exact: bool) -> list[PageCopy]:
        """Copy on write: the partly filled last page, if another request holds it too."""
        if not self._shares_last(pages, pool):
            return []
        source, target = pages[-1], pool.acquire()
        pool.release(source)
        pages[-1] = target
        return [PageCopy(source, target, exact)]

    def _shares_last(self, pages: list[int], pool: PagePool) -> bool:
        """The last page is partly filled, and another request holds it too."""
        return self.length % self.page_size > 0 and pool.references(pages[-1]) > 1

    def _cut(self) -> None:
        """Let go of the pages after the last token."""
        keep = -(-self.length // self.page_size)
        while len(self.pages) > keep:
            self._pool.release(self.pages.pop())
        while len(self.exact_pages) > keep:
            page = self.exact_pages.pop()
            if page >= 0 and self._exact_pool is not None:
                self._exact_pool.release(page)

    def _trim_exact(self) -> None:
        if self._exact_pool is None:
            return
        for index in range(1, len(self.exact_pages) - 3):
            page = self.exact_pages[index]
            if page >= 0:
                self._exact_pool.release(page)
                self.exact_pages[index] = -1

    @staticmethod
    def _pool_is_out(name: str, pool: PagePool, need: int) -> None:
        raise OutOfPages(f"{name}: expected {need} free pages, got {pool.free} of {pool.capacity}")
