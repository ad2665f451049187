"""One step's ragged batch: prefill, chunked prefill, decode and mixed steps in one record.

Three requests, page_size 16, one prefill of 5 tokens, one decode after 20, one chunk of 3 after 30:

    query_starts  [0, 5, 6, 9]       new tokens of request r are rows query_starts[r]:[r+1]
    context_lens  [5, 21, 33]        cached + new tokens
    page_table    [[7, ., .], [2, 4, .], [1, 9, 3]]
    positions     [0 1 2 3 4 | 20 | 30 31 32]
    slots         [112..116 | 4*16+4 | 9*16+14, 9*16+15, 3*16+0]

Everything a kernel needs on the device is a tensor; everything the host needs to launch it is a
plain integer. A forward never reads back from the device.

``plan_batch`` makes a plan from lists, ``plan_on_device`` from tensors that a scheduler keeps on a
device.
"""

from quantpage.batch.from_lists import plan_batch
from quantpage.batch.on_device import plan_on_device
from quantpage.batch.plan import BatchPlan, ExactPlan, derive, one_more

__all__ = ["BatchPlan", "ExactPlan", "derive", "one_more", "plan_batch", "plan_on_device"]
