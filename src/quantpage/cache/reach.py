"""How far back the queries of a layer see: what else of a request its pages have to hold.

Layers of one reach share page tables. What no query from a position on can see any more is given
back, so that a layer with a window of 1,024 tokens holds 17 or 18 pages of 64 tokens however long
the request is (cache/sequence says which).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Reach:
    """All tokens before a query, the last ``window`` of them, or those of its own chunk."""

    window: int = 0
    """Keys that a query sees, its own included; 0: no window."""
    chunk: int = 0
    """Query i sees keys i // chunk * chunk and on (chunked attention); 0: no chunks."""

    def __post_init__(self) -> None:
        if self.window < 0 or self.chunk < 0 or (self.window and self.chunk):
            raise ValueError(
                "window, chunk: expected one of them to be 0 and none below, got "
                f"{self.window}, {self.chunk}"
            )

    @property
    def limited(self) -> bool:
        """Whether tokens leave it."""
        return bool(self.window or self.chunk)

    def first_seen(self, query: int) -> int:
        """Position of the first key that the query at this position sees; never falls."""
        if self.chunk:
            return query // self.chunk * self.chunk
        return max(0, query - self.window + 1) if self.window else 0


EVERYTHING = Reach()
"""Of layers without a window."""

ROLLBACK = 64
"""Newest tokens of a step that may be rejected when it ends, where a page is fewer (a draft)."""


def pages_seen(reach: Reach, query: int, length: int, page_size: int) -> range:
    """Logical pages that queries from position ``query`` on read, of ``length`` tokens."""
    return range(reach.first_seen(query) // page_size, -(-length // page_size))


def exact_seen(reach: Reach, query: int, length: int, page_size: int) -> list[int]:
    """Of these, the ones that they read exactly (formats that keep some).

    Those are the first page, and from the page before the query's own on.
    """
    first, near = exact_ranges(reach, query, length, page_size)
    return [*first, *near]


def exact_ranges(reach: Reach, query: int, length: int, page_size: int) -> tuple[range, range]:
    """The same pages, however many they are: the first page where it is seen, and those near."""
    seen = pages_seen(reach, query, length, page_size)
    near = range(max(query // page_size - 1, seen.start), seen.stop)
    return range(int(bool(seen) and seen.start == 0 < near.start)), near


def kept_from(length: int, page_size: int) -> int:
    """Between steps: the first position whose query finds all that it sees, a page back."""
    return max(length - page_size, 0)


def kept_from_within(start: int, length: int, page_size: int) -> int:
    """The same during a step from ``start`` to ``length``, the newest of which may be rejected."""
    return max(start, length - max(page_size, ROLLBACK))


def held_from(reach: Reach, length: int) -> int:
    """First of ``length`` tokens that Transformers' own cache keeps: all but one of a window, of
    chunked attention as well."""
    window = reach.window or reach.chunk
    return max(0, length - window + 1) if window else 0


def most_pages(reach: Reach, tokens: int, page_size: int) -> tuple[int, int]:
    """(pages, exact pages) that a request of up to ``tokens`` holds at most, in a prompt's step or
    while tokens come one by one."""
    limit = reach.window or reach.chunk
    found = [(0, 0)]
    for length in range(max(1, tokens - limit - 2 * page_size), tokens + 1):
        for query in (kept_from(length - 1, page_size), kept_from_within(0, length, page_size)):
            rule = reach, query, length, page_size
            found.append((len(pages_seen(*rule)), len(exact_seen(*rule))))
    return max(pages for pages, _ in found), max(exact for _, exact in found)
