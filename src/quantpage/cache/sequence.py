"""One request: how many tokens it has cached, and in which pages.

A step is ``reserve(n)`` (pages for n more tokens; copies that the owner of the tensors must make
first), the writes of all layers, and ``commit()``. Pages are shared between forks and copied when
one of them writes into a page that both hold. Pages that no later query reads are given back when
the step is committed, and are -1 in the tables from then on:

    page:                  0    1    2    3    4    5
    kept between steps     x    x    x    x    x    x      all that a query a page back sees
    in a window of a page                 x    x    x      no more than that
    kept exact             x              x    x    x      the first, the current, the two before

``reserve(n, sparse=True)`` takes no page in the first place that the step alone would read: whoever
runs the layers gives each of them its own (cache/working).
"""

from dataclasses import dataclass

from quantpage.cache.counts import whole
from quantpage.cache.pool import PagePool
from quantpage.cache.reach import (
    EVERYTHING,
    Reach,
    exact_seen,
    kept_from,
    kept_from_within,
    pages_seen,
)
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
    """Logical page -> page; -1 before what the next query sees."""
    exact_pages: tuple[int, ...] = ()
    """Logical page -> exact page or -1, those that the next query sees present; empty where the
    format keeps none."""


class Sequence:
    """One request's tokens and pages; see the module's picture.

    Every operation is whole: when it raises, whatever it is, nothing has changed (cache/ledger).
    """

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        exact_pool: PagePool | None = None,
        reach: Reach = EVERYTHING,
    ) -> None:
        self._pool, self._exact_pool = pool, exact_pool
        self.page_size = whole("page_size", page_size, 1)
        self._ledger = pool.ledger
        if exact_pool is not None:
            exact_pool.join(pool)
        self.reach = reach
        self.length = 0
        """Tokens that are cached and committed."""
        self.reserved = 0
        """Tokens of the step under way."""
        self.pages: list[int] = []
        """Logical page -> page, or -1 once no query will see it."""
        self.exact_pages: list[int] = []
        """Logical page -> exact page or -1; empty where the format keeps none."""
        # Logical pages before which all that is unseen has been let go, of each table.
        self._looked_at = (0, 0)

    def pages_needed(self, tokens: int, sparse: bool = False) -> tuple[int, int]:
        """(pages, exact pages) that ``reserve(tokens, sparse)`` would acquire now."""
        if tokens == 0:
            return 0, 0
        more, exact_more = self._more(tokens, sparse)
        need = len(more) - more.count(False) + self._shares_last(self.pages, self._pool)
        if self._exact_pool is None:
            return need, 0
        shared = self._shares_last(self.exact_pages, self._exact_pool)
        return need, len(exact_more) - exact_more.count(False) + shared

    def reserve(self, tokens: int, sparse: bool = False) -> list[PageCopy]:
        """Make room for ``tokens`` more; the copies to make before they are written.

        sparse: only for what is read after the step, or after the rejection of its newest tokens
        (``reach.ROLLBACK``, or a page); other pages are -1.

        Raises OutOfPages with nothing changed. ``commit(0)`` takes it back, once the copies are
        made; make them inside of ``ledger.whole`` where that may fail.
        """
        return self._ledger.whole(self._reserve, whole("tokens", tokens), sparse)

    def _reserve(self, tokens: int, sparse: bool) -> list[PageCopy]:
        if self.reserved:
            raise CacheError("reserve: expected the last step to be committed first")
        need, exact_need = self.pages_needed(tokens, sparse)
        if need > self._pool.free:
            self._pool_is_out("pool", self._pool, need)
        if self._exact_pool is not None and exact_need > self._exact_pool.free:
            self._pool_is_out("exact_pool", self._exact_pool, exact_need)
        if tokens == 0:
            return []
        more, exact_more = self._more(tokens, sparse)
        copies = self._own(self.pages, self._pool, exact=False)
        self._extend(self.pages, self._pool, more)
        if self._exact_pool is not None:
            copies += self._own(self.exact_pages, self._exact_pool, exact=True)
            self._extend(self.exact_pages, self._exact_pool, exact_more)
        self._ledger.keep(self, "reserved")
        self.reserved = tokens
        return copies

    def commit(self, tokens: int | None = None) -> None:
        """The step is written: count its tokens, let go of pages no query will see.

        tokens: how many of them count, from the first; None: all. The rest of a draft that is
        rejected here may be of any length (``crop`` comes too late for a long one), unless the
        step was sparse: then CacheError, and nothing changed. ValueError for more than there are.
        """
        accepted = self.reserved if tokens is None else whole("tokens", tokens)
        if accepted > self.reserved:
            raise ValueError(f"tokens: expected 0..{self.reserved}, got {tokens}")
        if accepted < self.reserved:
            self._refuse_missing("commit", self.length + accepted)
        self._ledger.whole(self._commit, accepted)

    def cancel(self) -> None:
        """The step was not written: give back what ``reserve`` found."""
        self._ledger.whole(self._cut, self.length)

    def _commit(self, accepted: int) -> None:
        self._cut(self.length + accepted)
        self._release_unseen()

    def adopt(self, prefix: Prefix) -> None:
        """Begin with pages that another request wrote, already held for this one."""
        self._ledger.whole(self._adopt, prefix)

    def _adopt(self, prefix: Prefix) -> None:
        if self.length or self.reserved:
            raise CacheError(f"adopt: expected an empty sequence, got {self.length} tokens")
        exact = [] if self._exact_pool is None else list(prefix.exact_pages)
        if exact and len(exact) != len(prefix.pages):
            raise CacheError(
                f"adopt: expected {len(prefix.pages)} exact pages or -1, got {len(exact)}"
            )
        self._ledger.keep(self, "length", "pages", "exact_pages")
        self.pages, self.exact_pages = list(prefix.pages), exact
        self._refuse_missing("adopt", len(self.pages) * self.page_size)
        self.length = len(self.pages) * self.page_size

    def fork(self) -> "Sequence":
        """Another request with the same tokens, sharing every page.

        Raises CacheError during a step, before ``commit`` or ``cancel``.
        """
        if self.reserved:
            raise CacheError("fork: expected the last step to be committed first")
        made = Sequence(self._pool, self.page_size, self._exact_pool, self.reach)
        self._ledger.whole(made._become, self)
        return made

    def _become(self, other: "Sequence") -> None:
        self._ledger.keep(self, "length", "_looked_at", "pages", "exact_pages")
        self.length, self._looked_at = other.length, other._looked_at
        self.pages, self.exact_pages = list(other.pages), list(other.exact_pages)
        for pages, pool in self._tables():
            pool.share_all(page for page in pages if page >= 0)

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length`` on.

        A page is sure: ``length`` may be that much less than the most tokens that the request has
        had between steps; into a sparse step as far as ``reach.ROLLBACK`` (or a page) before its
        end, rejected tokens counted. Farther back it depends on which pages are still there.

        Raises CacheError, with nothing changed, when a page that the next query needs is no longer
        kept.
        """
        if self.reserved:
            raise CacheError("crop: expected the last step to be committed first")
        self.check_crop(length)
        self._ledger.whole(self._cut, length)

    def check_crop(self, length: int) -> None:
        """What ``crop`` refuses (CacheError, ValueError), of a step under way, too."""
        if whole("length", length) > self.length + self.reserved:
            raise ValueError(f"length: expected 0..{self.length + self.reserved}, got {length}")
        self._refuse_missing("crop", length)

    def free(self) -> None:
        """Let go of everything."""
        self._ledger.whole(self._cut, 0)

    def _more(self, tokens: int, sparse: bool) -> tuple[list[bool], list[bool]]:
        """Of the pages after the last, and of the exact ones: whether the pool has to give it."""
        end = self.length + tokens
        last = -(-end // self.page_size)
        new = range(len(self.pages), last)
        exact_new = range(len(self.exact_pages), 0 if self._exact_pool is None else last)
        if not (new or exact_new):
            # Most tokens of an answer stay in its last page.
            return [], []
        if not sparse:
            return [True] * len(new), [True] * len(exact_new)
        query = kept_from_within(self.length, end, self.page_size)
        seen = pages_seen(self.reach, query, end, self.page_size)
        exact = exact_seen(self.reach, query, end, self.page_size)
        return [page in seen for page in new], [page in exact for page in exact_new]

    def _tables(self) -> list[tuple[list[int], PagePool]]:
        tables = [(self.pages, self._pool)]
        if self._exact_pool is not None:
            tables.append((self.exact_pages, self._exact_pool))
        return tables

    def _own(self, pages: list[int], pool: PagePool, exact: bool) -> list[PageCopy]:
        """Copy on write: the partly filled last page, if another request holds it too."""
        if not self._shares_last(pages, pool):
            return []
        source, target = pages[-1], pool.acquire()
        pool.release(source)
        self._ledger.note(pages.__setitem__, len(pages) - 1, source)
        pages[-1] = target
        return [PageCopy(source, target, exact)]

    def _extend(self, pages: list[int], pool: PagePool, more: list[bool]) -> None:
        """Add a page of the pool, or -1, for each of ``more``."""
        if more:
            found = iter(pool.acquire_all(more.count(True)))
            self._ledger.note(pages.__delitem__, slice(len(pages), None))
            pages += [next(found) if kept else -1 for kept in more]

    def _shares_last(self, pages: list[int], pool: PagePool) -> bool:
        """The last page is partly filled, and another request holds it too."""
        return self.length % self.page_size > 0 and pool.references(pages[-1]) > 1

    def _cut(self, length: int) -> None:
        """Be ``length`` tokens long, with no step under way; let go of the pages after them."""
        self._ledger.keep(self, "length", "reserved", "_looked_at")
        self.length, self.reserved = length, 0
        keep = -(-length // self.page_size)
        for pages, pool in self._tables():
            if len(pages) > keep:
                gone = pages[keep:]
                self._ledger.note(pages.__setitem__, slice(keep, None), gone)
                del pages[keep:]
                pool.release_all(page for page in reversed(gone) if page >= 0)
        self._looked_at = (min(self._looked_at[0], keep), min(self._looked_at[1], keep))

    def _release_unseen(self) -> None:
        """Let go of what no query sees, be it after the newest tokens are forgotten."""
        query = kept_from(self.length, self.page_size)
        rule = self.reach, query, self.length, self.page_size
        looked_at = list(self._looked_at)
        for at, ((pages, pool), seen) in enumerate(
            zip(self._tables(), (pages_seen(*rule), exact_seen(*rule)), strict=False)
        ):
            # What is seen is all from some page on, and perhaps the first.
            near = next((page for page in seen if page), looked_at[at])
            for index in [0, *range(max(looked_at[at], 1), near)] if pages else []:
                if index not in seen and pages[index] >= 0:
                    self._ledger.note(pages.__setitem__, index, pages[index])
                    pool.release(pages[index])
                    pages[index] = -1
            looked_at[at] = max(looked_at[at], near)
        self._ledger.keep(self, "_looked_at")
        self._looked_at = (looked_at[0], looked_at[1])

    def _refuse_missing(self, act: str, length: int) -> None:
        """CacheError where the next query after ``length`` tokens needs a page that is gone."""
        for name, pages, seen in (
            ("", self.pages, pages_seen(self.reach, length, length, self.page_size)),
            (" exact", self.exact_pages, exact_seen(self.reach, length, length, self.page_size)),
        ):
            gone = [page for page in seen if pages and pages[page] < 0]
            if gone:
                raise CacheError(
                    f"{act}: expected a length whose last pages are still kept{name}, got "
                    f"{length}, for which page {gone[0]} is not"
                )

    @staticmethod
    def _pool_is_out(name: str, pool: PagePool, need: int) -> None:
        raise OutOfPages(f"{name}: expected {need} free pages, got {pool.free} of {pool.capacity}")
