"""What a cache holds, from layouts and counts alone: no tensor is made.

The rules are those by which requests keep pages (cache/reach), and the bytes those of the layouts
that allocate, so that what is planned is what is held.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from quantpage.cache.layout import CacheLayout
from quantpage.cache.reach import (
    EVERYTHING,
    Reach,
    exact_ranges,
    held_from,
    kept_from,
    kept_from_within,
    pages_seen,
)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's pages, and how far back its queries see."""

    layout: CacheLayout
    reach: Reach = EVERYTHING

    def pages(self, tokens: int) -> int:
        """Pages that a request of so many tokens holds between steps."""
        size = self.layout.page_size
        return len(pages_seen(self.reach, kept_from(tokens, size), tokens, size))

    def exact_pages(self, tokens: int) -> int:
        """Of these, the ones kept exact as well."""
        if self.layout.format.exact_pages is None:
            return 0
        size = self.layout.page_size
        return _count(*exact_ranges(self.reach, kept_from(tokens, size), tokens, size))

    def held_bytes(self, tokens: int) -> int:
        """Bytes that a request of so many tokens holds between steps."""
        pages = self.pages(tokens) * self.layout.bytes_per_page()
        return pages + self.exact_pages(tokens) * self.layout.exact_bytes_per_page()

    def working_bytes(self, start: int, tokens: int) -> int:
        """Bytes that a step from ``start`` to ``tokens`` works in beside what is kept
        (cache/working), while this layer runs."""
        size, layout = self.layout.page_size, self.layout
        query = kept_from_within(start, tokens, size)
        total = 0
        for seen, page_bytes in (
            (_page_ranges, layout.bytes_per_page()),
            (exact_ranges, layout.exact_bytes_per_page()),
        ):
            read = seen(self.reach, start, tokens, size)
            kept = seen(self.reach, query, tokens, size)
            new = [range(max(each.start, -(-start // size)), each.stop) for each in read]
            if _count(*new, *kept) > _count(*kept):
                total += _count(*read) * page_bytes
        return total

    def unquantized_bytes(self, tokens: int) -> int:
        """Bytes that Transformers' own cache holds for the same request."""
        held = tokens - held_from(self.reach, tokens)
        return held * self.layout.unquantized_bytes_per_token()


def heads_each(kv_heads: int, devices: int) -> int:
    """kv_heads on each of the devices that share them: an equal part, or one that several have.

    Raises ValueError where neither comes out even, which no engine serves.
    """
    if kv_heads % devices and devices % kv_heads:
        raise ValueError(
            f"tp: expected a number that divides {kv_heads} kv_heads, or that they divide, got "
            f"{devices}"
        )
    return max(kv_heads // devices, 1)


def held_bytes(layers: Iterable[LayerPlan], tokens: int) -> int:
    """Bytes that a request of so many tokens holds between steps, in all layers."""
    return sum(each.held_bytes(tokens) for each in layers)


def unquantized_bytes(layers: Iterable[LayerPlan], tokens: int) -> int:
    """The same in Transformers' own cache, in the model's dtype."""
    return sum(each.unquantized_bytes(tokens) for each in layers)


def longest_in(plans: Iterable[LayerPlan], budget: int) -> int:
    """Tokens of the longest request that is held in ``budget`` bytes; a number without end where
    every layer has a window that fits is cut off at 2^40."""
    kinds = Counter(plans)

    def fits(tokens: int) -> bool:
        return sum(n * plan.held_bytes(tokens) for plan, n in kinds.items()) <= budget

    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def prompt_bytes(layers: Iterable[LayerPlan], tokens: int, chunk: int | None = None) -> int:
    """The most bytes that the last step of a request's prompt takes, the pages it leaves counted.

    chunk: new tokens of that step; None: the whole prompt. Pages of before the step that its end
    does not keep stand beside those it brings.
    """
    layers = list(layers)
    start = 0 if chunk is None else (max(tokens, 1) - 1) // chunk * chunk
    working = max((each.working_bytes(start, tokens) for each in layers), default=0)
    return sum(_within(each, start, tokens) for each in layers) + working


def _within(layer: LayerPlan, start: int, tokens: int) -> int:
    """Bytes of the pages that a request holds in the step from ``start`` to ``tokens``."""
    layout, reach = layer.layout, layer.reach
    size = layout.page_size
    before, after = kept_from(start, size), kept_from_within(start, tokens, size)
    pages = _count(pages_seen(reach, before, start, size), pages_seen(reach, after, tokens, size))
    exact = _count(
        *exact_ranges(reach, before, start, size), *exact_ranges(reach, after, tokens, size)
    )
    return pages * layout.bytes_per_page() + exact * layout.exact_bytes_per_page()


def _page_ranges(reach: Reach, query: int, length: int, page_size: int) -> tuple[range, ...]:
    return (pages_seen(reach, query, length, page_size),)


def _count(*ranges: range) -> int:
    """Pages that are in one of them or more; nothing is listed, so that any length is counted."""
    total, end = 0, 0
    for each in sorted(ranges, key=lambda each: each.start):
        start = max(each.start, end)
        total += max(each.stop - start, 0)
        end = max(end, each.stop)
    return total
