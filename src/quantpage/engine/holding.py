"""What an answer holds in the page tables of every reach.

Layers that see equally far back share page tables (cache/reach); a model with windows in some
layers has two kinds. An answer reserves, counts and frees in all of them or in none.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

from quantpage.cache import PageCopy, PagePool, Prefix, Reach, Sequence
from quantpage.errors import OutOfPages


class Shelf(Protocol):
    """The pools of the layers of one reach."""

    reach: Reach
    pool: PagePool
    exact_pool: PagePool | None

    def new_sequence(self) -> Sequence:
        """A request without tokens."""


Shelves = Mapping[Reach, Shelf]


class Holding:
    """One answer's pages."""

    def __init__(self, shelves: Shelves, tables: dict[Reach, Sequence] | None = None) -> None:
        self._shelves = shelves
        self.tables = (
            {reach: shelf.new_sequence() for reach, shelf in shelves.items()}
            if tables is None
            else tables
        )

    @property
    def length(self) -> int:
        """Tokens that are cached and counted."""
        return next(iter(self.tables.values())).length

    def shortages(self, tokens: int) -> Iterator[tuple[Reach, int, int]]:
        """(reach, pages, exact pages) that ``reserve(tokens)`` lacks, where it lacks some."""
        for reach, table in self.tables.items():
            shelf = self._shelves[reach]
            need, exact_need = table.pages_needed(tokens, sparse=True)
            need -= shelf.pool.free
            exact_need -= 0 if shelf.exact_pool is None else shelf.exact_pool.free
            if need > 0 or exact_need > 0:
                yield reach, max(need, 0), max(exact_need, 0)

    def reserve(self, tokens: int) -> list[tuple[Reach, PageCopy]]:
        """Make room for ``tokens`` more; OutOfPages with nothing changed."""
        for reach, need, exact_need in self.shortages(tokens):
            raise OutOfPages(f"pages of {reach}: {need} and {exact_need} exact ones are missing")
        return [
            (reach, copy)
            for reach, table in self.tables.items()
            for copy in table.reserve(tokens, sparse=True)
        ]

    def commit(self) -> None:
        """The step is written: count its tokens."""
        for table in self.tables.values():
            table.commit()

    def adopt(self, prefixes: Mapping[Reach, Prefix]) -> None:
        """Begin, empty as it is, with pages that another answer wrote."""
        for reach, prefix in prefixes.items():
            self.tables[reach].adopt(prefix)

    def fork(self) -> "Holding":
        """Another answer with the same tokens, sharing every page."""
        return Holding(self._shelves, {reach: each.fork() for reach, each in self.tables.items()})

    def free(self) -> None:
        """Let go of everything."""
        for table in self.tables.values():
            table.free()
