"""A step over exact pages in parts: requests that decode, short chunks, and long ones.

A decode kernel reads codes and exact pages of its requests in one launch, where a prompt's kernels
take two and a merge, and would read a long context for one row. Long chunks run in working pages
(``working``), into which the pages of requests that decode need not be brought.
"""

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from torch import Tensor

from quantpage.batch import BatchPlan, ExactPlan, derive
from quantpage.integrations.vllm_plugin.formats import LONG_CHUNK
from quantpage.integrations.vllm_plugin.working import WorkingPages, plan_working
from quantpage.ops.dispatch import DECODE_TOKENS


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring requests of a step that are written and attended to by calls of their own."""

    rows: slice
    """Their tokens."""
    plan: BatchPlan
    working: WorkingPages | None = None
    """What each layer works in; None: in vLLM's pages."""


def parts_of(plan: BatchPlan, page_table: Tensor, slots: Tensor) -> tuple[Part, ...]:
    """``plan`` over exact pages too.

    page_table: int32 [requests, max_pages]; slots: int64 [tokens or more]. vLLM's runners for GPUs
    sort requests by kind; where they stand in another order they are one part.
    """
    kinds = [(new > DECODE_TOKENS) + (new > LONG_CHUNK) for new in plan.query_lens]
    if kinds != sorted(kinds):
        kinds = [max(kinds)] * len(kinds)
    counts = [len([*same]) for _, same in groupby(kinds)]
    ends = pairwise([0, *accumulate(counts)])
    return tuple(_part(plan, page_table, slots, first, end) for first, end in ends)


def _part(plan: BatchPlan, page_table: Tensor, slots: Tensor, first: int, end: int) -> Part:
    """The requests first..end (exclusive), of one kind."""
    own = plan if end - first == plan.num_requests else _some(plan, first, end)
    start = sum(plan.query_lens[:first])
    rows, table = slice(start, start + own.num_tokens), page_table[first:end]
    if own.max_query_len > LONG_CHUNK:
        return Part(rows, *plan_working(own, table))
    near = ExactPlan(*_aligned(first, table, slots[rows]))
    return Part(rows, derive(own, exact=near))


def _some(plan: BatchPlan, first: int, end: int) -> BatchPlan:
    """The step of the requests first..end (exclusive) alone, its rows counted from their first."""
    rows = slice(sum(plan.query_lens[:first]), sum(plan.query_lens[:end]))
    starts = plan.query_starts[first : end + 1]
    contexts, table, slots, positions = _aligned(
        first,
        plan.context_lens[first:end],
        plan.page_table[first:end],
        plan.slots[rows],
        plan.positions[rows],
    )
    return derive(
        plan,
        query_starts=starts - rows.start if first else starts,
        context_lens=contexts,
        page_table=table,
        slots=slots,
        positions=positions,
        query_lens=plan.query_lens[first:end],
        host_context_lens=plan.host_context_lens[first:end],
    )


def _aligned(first: int, *tensors: Tensor) -> list[Tensor]:
    """Views from the request ``first`` on, at addresses that kernels are compiled for."""
    return [each.clone() if first else each for each in tensors]
