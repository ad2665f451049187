"""How many pages an engine lays out for its layers, and their bytes, before a model has run.

Layers that see everything have the pages that the limits name. Layers with a window have no more
than their windows can fill, so that an engine's bytes are not its pages times those of a page.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from quantpage.cache.reach import ROLLBACK, Reach
from quantpage.cache.sizes import LayerPlan
from quantpage.engine.scheduler import Limits

EXACT_AN_ANSWER = 5
"""Exact pages that an answer holds: the first, the two before, its own, and the next."""


def pool_pages(reach: Reach, limits: Limits, page_size: int) -> int:
    """Pages for the layers of one reach: no more than its windows can fill, twice over for what is
    remembered."""
    if not reach.limited:
        return limits.pages
    answer = -(-(reach.window + ROLLBACK) // page_size) + 2
    step = -(-limits.step_tokens // page_size)
    return min(limits.pages, 2 * (limits.max_running * answer + step))


def pool_bytes(layers: Sequence[LayerPlan], limits: Limits) -> int:
    """Bytes of all pages, exact ones included."""
    total = 0
    for each in layers:
        layout = each.layout
        total += pool_pages(each.reach, limits, layout.page_size) * layout.bytes_per_page()
        if layout.format.exact_pages is not None:
            total += EXACT_AN_ANSWER * limits.max_running * layout.exact_bytes_per_page()
    return total


def unquantized_pool_bytes(layers: Sequence[LayerPlan], limits: Limits) -> int:
    """Bytes that as many tokens take in the model's own dtype."""
    total = 0
    for each in layers:
        size = each.layout.page_size
        tokens = pool_pages(each.reach, limits, size) * size
        total += tokens * each.layout.unquantized_bytes_per_token()
    return total


def fit_pages(layers: Sequence[LayerPlan], limits: Limits, memory: int) -> Limits:
    """``limits`` with as many pages as ``memory`` bytes hold, and no more than it names.

    Raises ValueError where two pages of every layer do not fit beside the exact pages of as many
    answers as may run at once.
    """

    def held(pages: int) -> int:
        return pool_bytes(layers, replace(limits, pages=pages))

    if held(2) > memory:
        one = pool_bytes(layers, replace(limits, pages=2, max_running=1))
        fewer = (
            ""
            if one == held(2)
            else f" beside the exact pages of max_requests={limits.max_running} "
            f"(max_requests=1: {one:,})"
        )
        raise ValueError(
            f"memory: expected at least {held(2):,} bytes, two pages of every layer{fewer}; "
            f"got {memory:,}"
        )
    counts = range(2, max(limits.pages, 2) + 1)
    return replace(limits, pages=counts[bisect_right(counts, memory, key=held) - 1])
