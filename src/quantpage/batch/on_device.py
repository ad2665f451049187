"""A step whose lengths and tables are on the device already, as a scheduler there keeps them.

``plan_batch`` has lists; here the host knows only how many new tokens each request has and how long
contexts may be at most. Nothing is read back, so that the plan can be made inside a captured graph.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from quantpage.batch.plan import BatchPlan, ExactPlan, bound_lengths


def plan_on_device(
    query_starts: Int[Tensor, " requests_plus_1"],
    context_lens: Int[Tensor, " requests"],
    page_table: Int[Tensor, "requests max_pages"],
    page_size: int,
    query_lens: Sequence[int],
    longest: int | Sequence[int],
    exact_table: Int[Tensor, "requests max_pages"] | None = None,
) -> BatchPlan:
    """Build a step from int32 tensors of one device.

    query_starts: first row of each request's new tokens, and the end. context_lens: cached + new
    tokens. page_table: page ids, entries past a context are never read. query_lens: the host's
    copy of the new tokens a request. longest: tokens that a context has at most, of each request or
    of all; columns of the table cover them. exact_table: logical page -> exact page or -1, for
    formats that keep exact pages.

    Slots and positions are worked out where the tensors are, so that a CUDA graph may hold the
    call; there a row without a request has context_lens 0, and writes and reads nothing. On a CPU
    what they hold is checked, elsewhere their shapes (``BatchPlan.check_values`` reads back).
    Raises ValueError for what does not belong together.
    """
    query_lens = tuple(query_lens)
    bounds = (longest,) * len(query_lens) if isinstance(longest, int) else tuple(longest)
    for name, given in (("query_starts", query_starts), ("context_lens", context_lens)):
        if given.ndim != 1 or given.dtype != torch.int32:
            raise ValueError(
                f"{name}: expected int32 of one dimension, got {given.dtype} {tuple(given.shape)}"
            )
    # What is indexed below; the plan's own checks come after.
    if len(query_starts) != len(query_lens) + 1 or len(context_lens) != len(query_lens):
        raise ValueError(
            f"query_starts, context_lens: expected {len(query_lens) + 1} and {len(query_lens)} "
            f"numbers for {len(query_lens)} query_lens, got {len(query_starts)} and "
            f"{len(context_lens)}"
        )
    rows = torch.arange(sum(query_lens), dtype=torch.int32, device=page_table.device)
    owners = torch.searchsorted(query_starts[1:], rows, right=True)
    # Numbers that cannot be are refused below where somebody can read them, and index nothing.
    owners = owners.clamp_max(max(len(query_lens) - 1, 0))
    # From the end of a context backwards, as new tokens are its last.
    positions = (context_lens[owners] - query_starts[1:][owners] + rows).long()

    def slots(table: Tensor) -> Tensor:
        columns = (positions // page_size).clamp(0, table.shape[1] - 1)
        pages = table[owners, columns].long()
        nowhere = (pages < 0) | (positions < 0)
        return torch.where(nowhere, -1, pages * page_size + positions % page_size)

    exact = None if exact_table is None else ExactPlan(exact_table, slots(exact_table))
    plan = BatchPlan(
        query_starts=query_starts,
        context_lens=context_lens,
        page_table=page_table,
        slots=slots(page_table),
        positions=positions,
        page_size=page_size,
        query_lens=query_lens,
        host_context_lens=bounds,
        exact=exact,
    )
    return bound_lengths(plan)
