"""Which requests of a prefill step take which way, their rows, and what is refused."""

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.formats import FORMATS
from quantpage.hardware import DeviceInfo
from quantpage.ops.attend.prefill.ways import (
    Ways,
    choose_ways,
    take_requests,
)
from quantpage.ops.dispatch import Call
from quantpage.ops.refusals import PREFILL_GLUON, PREFILL_TRITON

pytestmark = pytest.mark.pure


def test_ways():
    assert choose_ways((512, 300), 4, "gluon", True) == Ways(workspace=None)
    assert choose_ways((20, 30), 4, "gluon", True) == Ways(pages=None)
    assert choose_ways((512, 1, 0, 30), 4, "gluon", True) == Ways((0,), (3,), (1,))
    assert choose_ways((512, 1, 0, 30), 4, "triton", False) == Ways((0,), (1, 3), ())
    assert choose_ways((), 4, "triton", True) == Ways(pages=None)


def test_taking_requests_keeps_their_rows():
    batch = plan_batch((3, 1, 2), (5, 8, 20), [[1], [2], [3, 4]], 16)
    taken, rows = take_requests(batch, (0, 2))
    assert rows.tolist() == [0, 1, 2, 4, 5]
    assert taken.query_starts.tolist() == [0, 3, 5]
    assert taken.context_lens.tolist() == [5, 20] and taken.host_context_lens == (5, 20)
    assert taken.positions.tolist() == [2, 3, 4, 18, 19]
    assert taken.page_table.tolist() == [[1, 0], [3, 4]]


@pytest.mark.parametrize(("members", "starts"), [((0, 2), [0, 3, 3, 5]), ((2, 3), [3, 5, 9])])
def test_neighbours_keep_the_rows_of_the_whole_step(members, starts):
    """Nobody between them has new tokens: their queries and results lie where they are."""
    batch = plan_batch((3, 0, 2, 4), (5, 8, 20, 4), [[1], [2], [3, 4], [5]], 16)
    taken, rows = take_requests(batch, members)
    first, end = members[0], members[-1] + 1
    assert rows is None
    assert taken.query_starts.tolist() == starts
    assert taken.query_lens == batch.query_lens[first:end]
    assert taken.host_context_lens == batch.host_context_lens[first:end]
    assert torch.equal(taken.context_lens, batch.context_lens[first:end])
    assert torch.equal(taken.page_table, batch.page_table[first:end])
    # What kernels are given begins as aligned as any tensor.
    for each in (taken.query_starts, taken.context_lens, taken.page_table):
        assert each.storage_offset() == 0


def call(**given):
    hopper = DeviceInfo("cuda", "H", (9, 0), 132)
    facts = {"device": hopper, "format": FORMATS["int8"], "dtype": torch.bfloat16, "q_heads": 8}
    facts |= {"kv_heads": 2, "head_dim": 128, "value_head_dim": 128, "page_size": 64}
    return Call(**(facts | given))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"device": DeviceInfo("cpu", "c", None, 2)}, "CUDA"),
        ({"device": DeviceInfo("cuda", "A", (8, 0), 108)}, "9.0, got 8.0"),
        ({"mask": "interval"}, "interval"),
        ({"phase": "decode"}, "decode"),
        ({"head_dim": 320}, "320"),
        ({"head_dim": 100}, "100"),
        ({"dtype": torch.float32}, "float32"),
    ],
)
def test_refusals_say_what_they_got(given, word):
    assert any(word in said for said in PREFILL_GLUON(call(**given)))


def test_the_portable_kernel_takes_what_gluon_refuses():
    ampere = DeviceInfo("cuda", "A", (8, 0), 108)
    assert PREFILL_TRITON(call(device=ampere, dtype=torch.float32, head_dim=100)) == []
    turing = DeviceInfo("cuda", "T", (7, 5), 40)
    assert any("8.0 or later, got 7.5" in said for said in PREFILL_TRITON(call(device=turing)))
