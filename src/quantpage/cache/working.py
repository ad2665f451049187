"""Pages that a step reads and nobody reads later, for one layer at a time.

A prompt of 8,192 tokens in a layer with a window of 1,024 fills 128 pages, of which 17 are seen
again; of its exact pages four are. Kept for all layers until the step ends they would be the
largest part of the cache. So a layer runs the step in pages of its own, which the next layer uses
again:

    1. what the step reads of earlier tokens is brought from the cache's pages
    2. the step writes and attends there, as it would in the cache
    3. what later queries see is copied back

Codes and exact pages are worked on so independently of each other, and only where a step has pages
that are not kept (``Sequence.reserve(sparse=True)``): decode steps and drafts have none.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantpage.cache.layout import CacheLayout
from quantpage.cache.paged import allocate_layer, copy_rows
from quantpage.cache.reach import Reach, exact_seen, pages_seen
from quantpage.cache.sequence import Sequence
from quantpage.cache.views import LayerKV

Pairs = tuple[Tensor, Tensor]
"""Page ids: from, to."""


@dataclass(frozen=True, slots=True)
class WorkingPages:
    """How many a layer needs of one kind, and what is copied where."""

    count: int
    tables: list[list[int]]
    """Of each request: logical page -> working page, -1 where the step does not read it."""
    brought: Pairs
    """From the cache to the working pages, before the step."""
    kept: Pairs
    """From the working pages to the cache, after it."""


@dataclass(frozen=True, slots=True)
class Working:
    """What one step of all requests works in; None: in the cache's own pages."""

    codes: WorkingPages | None
    exact: WorkingPages | None

    def nbytes(self, layout: CacheLayout) -> int:
        """Bytes that a layer's working pages take."""
        codes = 0 if self.codes is None else self.codes.count * layout.bytes_per_page()
        exact = 0 if self.exact is None else self.exact.count * layout.exact_bytes_per_page()
        return codes + exact

    def open(self, layout: CacheLayout, pages: LayerKV) -> LayerKV:
        """The view to write to and to attend over, in place of the cache's ``pages``."""
        codes, exact = self.codes, self.exact if pages.exact_key is not None else None
        made = allocate_layer(
            layout,
            0 if codes is None else codes.count,
            0 if exact is None else exact.count,
            pages.device,
            pages.static,
        )
        if codes is not None:
            copy_rows(pages, made, codes.brought)
        if exact is not None:
            copy_rows(pages, made, exact.brought, exact=True)
        opened = pages
        if codes is not None:
            opened = replace(opened, key=made.key, value=made.value)
        if exact is not None:
            opened = replace(opened, exact_key=made.exact_key, exact_value=made.exact_value)
        return opened

    def close(self, opened: LayerKV, pages: LayerKV) -> None:
        """Copy what later queries see back to the cache's ``pages``."""
        if self.codes is not None:
            copy_rows(opened, pages, self.codes.kept)
        if self.exact is not None and pages.exact_key is not None:
            copy_rows(opened, pages, self.exact.kept, exact=True)


def find_working(requests: Rows[Sequence], device: torch.device) -> Working | None:
    """What the reserved step of ``requests`` works in; None where all of its pages are kept."""
    codes = [_read(each, each.pages, pages_seen) for each in requests]
    exact = [_read(each, each.exact_pages, exact_seen) for each in requests]
    made = Working(_working(requests, codes, device), _working(requests, exact, device, True))
    return made if made.codes is not None or made.exact is not None else None


def _read(
    request: Sequence, pages: list[int], seen: Callable[[Reach, int, int, int], Iterable[int]]
) -> Iterable[int]:
    """Logical pages that the step under way reads or writes."""
    if not request.reserved or not pages:
        return ()
    end = request.length + request.reserved
    return seen(request.reach, request.length, end, request.page_size)


def _working(
    requests: Rows[Sequence], read: Rows[Iterable[int]], device: torch.device, exact: bool = False
) -> WorkingPages | None:
    held = [each.exact_pages if exact else each.pages for each in requests]
    if not any(pages[at] < 0 for pages, seen in zip(held, read, strict=True) for at in seen):
        return None
    count, tables = 0, list[list[int]]()
    brought: list[tuple[int, int]] = []
    kept: list[tuple[int, int]] = []
    for request, pages, seen in zip(requests, held, read, strict=True):
        table = [-1] * len(pages)
        written = request.length // request.page_size
        for at in seen:
            table[at] = count
            if at * request.page_size < request.length:
                brought.append((pages[at], count))
            if at >= written and pages[at] >= 0:
                kept.append((count, pages[at]))
            count += 1
        tables.append(table)
    return WorkingPages(count, tables, _pairs(brought, device), _pairs(kept, device))


def _pairs(pairs: list[tuple[int, int]], device: torch.device) -> Pairs:
    both = torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2).to(device)
    return both[:, 0], both[:, 1]
