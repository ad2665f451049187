"""Work items of prefill as kernels read them: a row of prefill/plan's table, its fields by name.

The Hopper kernel reads columns by their names, each where it is wanted.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantpage.ops.attend.flash.triton_items import NEW, POSITION, ROW, TOKEN
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
WORKSPACE_ROW = Constant(4)
BASE = Constant(5)
END = Constant(6)
REQUEST = Constant(7)
PART = Constant(8)


@triton.jit
def load_item(work, index):
    """Row ``index`` of the table; what nobody uses is not loaded."""
    at = work + index * FIELDS
    return WorkItem(
        tl.load(at + TOKEN),
        tl.load(at + NEW),
        tl.load(at + POSITION),
        tl.load(at + ROW),
        tl.load(at + WORKSPACE_ROW),
        tl.load(at + BASE),
        tl.load(at + END),
        tl.load(at + REQUEST),
        tl.load(at + PART),
    )
