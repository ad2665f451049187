"""What is known of prompts in the page tables of every reach, which hit together or not at all.

Layers that see equally far back share page tables (cache/reach). A beginning of a prompt is of use
where the pages that the next query sees are known in every table: that is where a hit ends.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from quantpage.cache.pool import PagePool
from quantpage.cache.prefix import PrefixCache
from quantpage.cache.reach import Reach
from quantpage.cache.sequence import Prefix
from quantpage.cache.sequence import Sequence as Request


class Pools(Protocol):
    """Where the pages of the layers of one reach come from."""

    pool: PagePool
    exact_pool: PagePool | None


class KnownPages:
    """Prefix caches of one model and format, a reach each."""

    def __init__(self, pools: Mapping[Reach, Pools], page_size: int) -> None:
        self._page_size = page_size
        self._of = {
            reach: PrefixCache(each.pool, page_size, b"", each.exact_pool, reach)
            for reach, each in pools.items()
        }

    def __len__(self) -> int:
        """Pages of tokens that are known."""
        return max(map(len, self._of.values()), default=0)

    def items(self) -> Iterable[tuple[Reach, PrefixCache]]:
        """What is known of the layers of each reach."""
        return self._of.items()

    def acquire(
        self,
        tokens: Sequence[int],
        salt: bytes = b"",
        may_end: Callable[[int], bool] = lambda at: True,
    ) -> tuple[int, dict[Reach, Prefix]]:
        """The longest known beginning of ``tokens``: its length, and its pages, held for a request.

        salt: what the pages depend on besides tokens; only what was inserted with the same is
        found. may_end: whether so many tokens may be taken without the next. Nothing known: 0 and
        no pages.
        """
        ends = [each.hits(tokens, salt) for each in self._of.values()]
        common = set.intersection(*ends) if ends else set()
        pages = max((each for each in common if may_end(each * self._page_size)), default=0)
        if not pages:
            return 0, {}
        known = tokens[: pages * self._page_size]
        return len(known), {reach: each.acquire(known, salt) for reach, each in self._of.items()}

    def insert(
        self, tokens: Sequence[int], tables: Mapping[Reach, Request], salt: bytes = b""
    ) -> int:
        """Know the full pages of a request that has cached ``tokens``; pages added."""
        added = [each.insert(tokens, tables[reach], salt) for reach, each in self._of.items()]
        return max(added, default=0)

    def shrink(self, most: int) -> None:
        """Forget down to ``most`` pages in each table, least recently used first."""
        for each in self._of.values():
            each.evict(max(0, len(each) - most))

    def give_way(self, shortages: Iterable[tuple[Reach, int, int]]) -> bool:
        """Forget (reach, pages, exact pages) that are missing elsewhere, least recently used first;
        whether that freed any."""
        freed = 0
        for reach, need, exact_need in shortages:
            freed += self._of[reach].evict(need) if need else 0
            freed += self._of[reach].evict_exact(exact_need) if exact_need else 0
        return freed > 0

    def clear(self) -> None:
        """Forget everything."""
        for each in self._of.values():
            each.clear()
