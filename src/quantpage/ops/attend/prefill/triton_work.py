"""Work items of prefill as kernels read them: a row of prefill/plan's table, its fields by name.

Gluon kernels use the same record and load.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantpage.ops.attend.prefill.plan import WORK_FIELDS
from quantpage.ops.triton.common import Constant


class WorkItem(NamedTuple):
    """A tile of one request's packed rows (a token and a query head of the group) and its keys."""

    token: Any
    """Row of the request's first new token."""
    new: Any
    """New tokens of the request."""
    position: Any
    """Of the first of them."""
    row: Any
    """First packed row."""
    workspace_row: Any
    base: Any
    """Key of that row: the first of this item."""
    end: Any
    """End of keys."""
    request: Any
    part: Any
    """Which part of the request's keys; each has results of its own."""


assert len(WorkItem._fields) == len(WORK_FIELDS)
FIELDS = Constant(len(WORK_FIELDS))


@triton.jit
def load_item(work, index):
    """Row ``index`` of the table; what nobody uses is not loaded."""
    at = work + index * FIELDS
    return WorkItem(
        tl.load(at),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
        tl.load(at + 7),
        tl.load(at + 8),
    )
