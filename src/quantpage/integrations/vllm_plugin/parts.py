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
    """The requests first .. end - 1, of one kind."""
    start = sum(plan.query_lens[:first])
    rows = slice(start, sum(plan.query_lens[:end]))
    if max(plan.query_lens[first:end], default=0) > LONG_CHUNK:
        return Part(rows, *plan_working(plan.part(first, end), page_table[first:end]))
    over = derive(plan, exact=ExactPlan(page_table, slots[: plan.num_tokens]))
    return Part(rows, over.part(first, end))
