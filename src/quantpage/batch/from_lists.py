"""A step from what the host knows: lists of lengths and of pages."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from quantpage.batch.checks import INT32_END, places_of, table_rows, whole_numbers
from quantpage.batch.plan import BatchPlan, ExactPlan


def plan_batch(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    page_tables: Sequence[Sequence[int]],
    page_size: int,
    device: torch.device | str = "cpu",
    exact_tables: Sequence[Sequence[int]] | None = None,
    first_pages: Sequence[int] | None = None,
) -> BatchPlan:
    """Build a step from host integers.

    query_lens: new tokens a request. context_lens: cached + new tokens a request.
    page_tables: pages of each request, enough for its context. exact_tables: logical page ->
    exact page or -1, for formats that keep exact pages. first_pages: logical page of each request
    before which its tables may say anything, as no query of the step sees them; None: 0.

    Raises ValueError when a table is too short, lengths do not fit, a page is written by two
    requests, or an exact page that the step needs is missing.
    """
    (page_size,) = whole_numbers("page_size", (page_size,))
    if page_size < 1:
        raise ValueError(f"page_size: expected at least 1 token, got {page_size}")
    query_lens = whole_numbers("query_lens", query_lens)
    context_lens = whole_numbers("context_lens", context_lens)
    if not len(query_lens) == len(context_lens) == len(page_tables):
        raise ValueError(
            f"query_lens, context_lens, page_tables: expected one entry a request, got "
            f"{len(query_lens)}, {len(context_lens)}, {len(page_tables)}"
        )
    if exact_tables is not None and len(exact_tables) != len(query_lens):
        raise ValueError(
            f"exact_tables: expected {len(query_lens)}, one a request, got {len(exact_tables)}"
        )
    for row, (new, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        if not 0 <= new <= context:
            raise ValueError(f"query_lens[{row}]: expected 0..context {context}, got {new}")
        if context >= INT32_END:
            raise ValueError(f"context_lens[{row}]: expected less than 2^31, got {context}")
    # Outside of inference mode, so that torch counts writes to them (check_unchanged).
    with torch.inference_mode(False):
        table = table_rows("page_tables", page_tables, context_lens, page_size, fill=0)
        news, contexts = (np.array(x, dtype=np.int64) for x in (query_lens, context_lens))
        owners, positions = places_of(news, contexts)
        exact = None
        if exact_tables is not None:
            near = table_rows("exact_tables", exact_tables, context_lens, page_size, fill=-1)
            slots = _slots(near, owners, positions, page_size)
            exact = ExactPlan(torch.from_numpy(near), torch.from_numpy(slots))
        plan = BatchPlan(
            query_starts=torch.tensor(
                [0, *accumulate(query_lens)], dtype=torch.int32, device="cpu"
            ),
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device="cpu"),
            page_table=torch.from_numpy(table),
            slots=torch.from_numpy(_slots(table, owners, positions, page_size)),
            positions=torch.from_numpy(positions),
            page_size=page_size,
            query_lens=query_lens,
            host_context_lens=context_lens,
            exact=exact,
            first_pages=None if first_pages is None else tuple(first_pages),
        )
        return plan.to(device)


def _slots(
    table: np.ndarray, owners: np.ndarray, positions: np.ndarray, page_size: int
) -> np.ndarray:
    pages = table[owners, positions // page_size].astype(np.int64)
    return np.where(pages < 0, -1, pages * page_size + positions % page_size)
