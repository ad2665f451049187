"""Exact pages that a long chunk's step reads and nobody reads later, for one layer at a time.

vLLM's pool holds of such a chunk only what later steps read (``exact``); entries of its tables that
hold nothing name the null page, 0. So a layer runs the step in pages of its own, in which the next
layer runs it then (as ``cache/working`` does where the host knows the tables):

    1. the page in which the chunk begins is brought, if tokens of before stand in it
    2. the step is written; its pages are copied to the pool, those that have no place there onto
       the null page
    3. the first page of the request and the one before the chunk are brought: another request may
       have written them in this very step

Working pages of all requests lie in this order: those that are written, request by request; the
page before of each; the first page of each.
"""

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, ExactPlan, derive
from quantpage.cache import CacheLayout, LayerKV, QuantizedPages
from quantpage.cache.cells import exact_cell_bytes, exact_of_cells
from quantpage.hardware import upload

_Pages = Tensor | QuantizedPages
_Planes = tuple[Tensor, _Pages, _Pages]
"""Working pages as cells, and their exact_key and exact_value."""


def most_pages(tokens: int, requests: int, page_size: int) -> int:
    """Working pages of a step of ``requests`` whose new tokens are so many in all."""
    return tokens // page_size + 4 * requests


@dataclass(frozen=True, slots=True)
class WorkingPages:
    """What the layers of a step work in, one after the other."""

    count: int
    begun: tuple[Tensor, Tensor] | None
    """Pool pages and working pages: those in which chunks begin. None: at their first rows."""
    written: Tensor
    """Pool page of each working page that the step writes."""
    before: Tensor
    """Pool pages of the others."""
    _made: dict[CacheLayout, _Planes] = field(init=False, default_factory=dict)
    """Layers that are alike work in the same memory."""

    def open(self, pool: Tensor, view: LayerKV, layout: CacheLayout) -> tuple[Tensor, LayerKV]:
        """Working pages as cells, and ``view`` with them in the place of ``pool``'s.

        pool: as the ``exact`` of ``layer_of_cells``.
        """
        made = self._made.get(layout)
        if made is None:
            cells = pool.new_empty(self.count, layout.kv_heads, exact_cell_bytes(layout))
            made = self._made[layout] = cells, *exact_of_cells(cells, layout)
        cells, key, value = made
        if self.begun is not None:
            brought, into = self.begun
            _words(cells)[into] = _words(pool)[brought]
        return cells, replace(view, exact_key=key, exact_value=value)

    def keep(self, cells: Tensor, pool: Tensor) -> None:
        """After the write: the step's pages to the pool."""
        _words(pool).index_copy_(0, self.written, _words(cells)[: len(self.written)])

    def bring(self, pool: Tensor, cells: Tensor) -> None:
        """After every request's pages are in the pool: what the step reads of earlier ones."""
        into = _words(cells)[len(self.written) :]
        torch.index_select(_words(pool), 0, self.before, out=into)


def plan_working(plan: BatchPlan, pool_table: Tensor) -> tuple[BatchPlan, WorkingPages]:
    """``plan`` over working pages.

    pool_table: int32 [requests, max_pages], as vLLM keeps it. Nothing is read back: how many tokens
    a request has before is the device's to know, where steps are under way at once.
    """
    size, news, requests = plan.page_size, plan.query_lens, plan.num_requests
    device = pool_table.device
    # As many as ``new`` tokens can stand in, wherever they begin.
    touched = [-(-(new - 1) // size) + 1 for new in news]
    bases = [0, *accumulate(touched)]
    total = bases.pop()

    base, new, pages = upload(torch.tensor([bases, news, touched]), device)
    contexts = plan.context_lens.long()
    starts = contexts - new
    first = starts // size
    table, last = pool_table.long(), pool_table.shape[1] - 1
    columns = torch.arange(table.shape[1], device=device)[None]
    request = torch.arange(requests, device=device)
    place = columns - first[:, None]
    here = (place >= 0) & (columns * size < contexts[:, None])
    working = torch.where(here, base[:, None] + place, -1)
    working = torch.where(place == -1, total + request[:, None], working)
    behind = (columns == 0) & (place < 0)
    working = torch.where(behind, total + requests + request[:, None], working)
    row = torch.arange(plan.num_tokens, device=device)
    offset = base * size + starts % size - plan.query_starts[:-1]
    slots = row + offset.repeat_interleave(new, output_size=plan.num_tokens)

    owner = request.repeat_interleave(pages, output_size=total)
    at = torch.arange(total, device=device) - base[owner] + first[owner]
    kept = table[owner, at.clamp(max=last)]
    written = torch.where(at * size < contexts[owner], kept, 0)
    before = table.gather(1, (first - 1).clamp(min=0)[:, None])[:, 0]
    begun = None
    if any(context > each for context, each in zip(plan.host_context_lens, news, strict=True)):
        begun = table.gather(1, first.clamp(max=last)[:, None])[:, 0], base
    made = WorkingPages(total + 2 * requests, begun, written, torch.cat([before, table[:, 0]]))
    return derive(plan, exact=ExactPlan(working.int(), slots)), made


def _words(cells: Tensor) -> Tensor:
    """Bytes eight at a time: a cell is whole and aligned 16 bytes (cache/cells)."""
    return cells.view(torch.int64)
