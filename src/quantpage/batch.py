"""One step's ragged batch: prefill, chunked prefill, decode and mixed steps in one record.

Three requests, page_size 16, one prefill of 5 tokens, one decode after 20, one chunk of 3 after 30:

    query_starts  [0, 5, 6, 9]       new tokens of request r are rows query_starts[r]:[r+1]
    context_lens  [5, 21, 33]        cached + new tokens
    page_table    [[7, ., .], [2, 4, .], [1, 9, 3]]
    positions     [0 1 2 3 4 | 20 | 30 31 32]
    slots         [112..116 | 4*16+4 | 9*16+14, 9*16+15, 3*16+0]

Everything a kernel needs on the device is a tensor; everything the host needs to launch it is a
plain integer. A forward never reads back from the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """Where a step's exact pages are (formats that keep some)."""

    page_table: Int[Tensor, "requests max_pages"]
    """Logical page -> exact page, -1 where the page is not kept. Every page that a new token
    stands in is present, and so are the page before the first of them and each request's first."""
    slots: Int[Tensor, " tokens"]
    """Exact page * page_size + offset of each new token."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class BatchPlan:
    """One step's requests; see the module's example."""

    query_starts: Int[Tensor, " requests_plus_1"]
    """int32: first row of each request, and the end."""
    context_lens: Int[Tensor, " requests"]
    """int32: cached + new tokens of each request."""
    page_table: Int[Tensor, "requests max_pages"]
    """int32: page ids; entries past a request's context are never read."""
    slots: Int[Tensor, " tokens"]
    """int64: page * page_size + offset where each new token is written; -1 is skipped."""
    positions: Int[Tensor, " tokens"]
    """int64: index of each new token in its request; the causal rule compares these."""
    page_size: int
    query_lens: tuple[int, ...]
    """Host copy: new tokens a request."""
    host_context_lens: tuple[int, ...]
    """Host copy of ``context_lens``; under CUDA graphs an upper bound."""
    exact: ExactPlan | None = None

    @property
    def num_requests(self) -> int:
        """Requests in the step."""
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        """New tokens in the step."""
        return sum(self.query_lens)

    @property
    def max_query_len(self) -> int:
        """Most new tokens of one request."""
        return max(self.query_lens, default=0)

    @property
    def max_context_len(self) -> int:
        """Longest context, an upper bound under CUDA graphs."""
        return max(self.host_context_lens, default=0)


def plan_batch(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_tables: Sequence[Sequence[int]],
    page_size: int,
    device: torch.device | str = "cpu",
    exact_tables: Sequence[Sequence[int]] | None = None,
) -> BatchPlan:
    """Build a step from host integers.

    query_lens: new tokens a request. context_lens: cached + new tokens a request.
    page_tables: pages of each request, enough for its context. exact_tables: logical page ->
    exact page or -1, for formats that keep exact pages.

    Raises ValueError when a table is too short or lengths do not fit.
    """
    if not len(query_lens) == len(context_lens) == len(page_tables):
        raise ValueError(
            f"query_lens, context_lens, page_tables: expected one entry a request, got "
            f"{len(query_lens)}, {len(context_lens)}, {len(page_tables)}"
        )
    for row, (new, context, pages) in enumerate(
        zip(query_lens, context_lens, page_tables, strict=True)
    ):
        if not 0 <= new <= context:
            raise ValueError(f"query_lens[{row}]: expected 0..context {context}, got {new}")
        if len(pages) * page_size < context:
            raise ValueError(
                f"page_tables[{row}]: expected {-(-context // page_size)} pages for {context} "
                f"tokens, got {len(pages)}"
            )
        if any(page < 0 for page in pages[: -(-context // page_size)]):
            raise ValueError(f"page_tables[{row}]: expected page ids of at least 0, got {pages}")
    table = _rectangle(page_tables, fill=0)
    positions = torch.cat(
        [torch.empty(0, dtype=torch.int64)]
        + [torch.arange(c - n, c) for n, c in zip(query_lens, context_lens, strict=True)]
    )
    owners = torch.repeat_interleave(
        torch.arange(len(query_lens)), torch.tensor(list(query_lens), dtype=torch.int64)
    )
    exact = None
    if exact_tables is not None:
        exact_table = _rectangle(exact_tables, fill=-1)
        exact = ExactPlan(
            exact_table.to(device), _slots(exact_table, owners, positions, page_size).to(device)
        )
    return BatchPlan(
        query_starts=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32, device=device),
        context_lens=torch.tensor(list(context_lens), dtype=torch.int32, device=device),
        page_table=table.to(device),
        slots=_slots(table, owners, positions, page_size).to(device),
        positions=positions.to(device),
        page_size=page_size,
        query_lens=tuple(query_lens),
        host_context_lens=tuple(context_lens),
        exact=exact,
    )


def _rectangle(tables: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max([1, *map(len, tables)])
    rows = [[*table, *[fill] * (width - len(table))] for table in tables]
    return torch.tensor(rows, dtype=torch.int32).reshape(len(tables), width)


def _slots(table: Tensor, owners: Tensor, positions: Tensor, page_size: int) -> Tensor:
    pages = table[owners, positions // page_size].to(torch.int64)
    return torch.where(pages < 0, -1, pages * page_size + positions % page_size)
