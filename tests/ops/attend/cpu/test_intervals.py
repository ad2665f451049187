"""A step's layers share the ranges of a mask; another mask, however it came about, gets its own."""

import pytest
import torch

from quantpage.formats import FORMATS
from quantpage.masks import ColumnIntervals, RowIntervals, tree_verification
from quantpage.ops.attend import AttendParams, cpu, torch_blockwise
from quantpage.ops.attend.cpu import intervals
from tests.ops.cpu_cases import AVAILABLE, Shape, make_case
from tests.tolerances import assert_agrees

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not AVAILABLE, reason="no compiled core in this installation"),
]
SHAPE = Shape(64, 4, 2, 16, (20,), (20,))


def own_key_alone(intervals):
    intervals[..., 0] = torch.arange(0, 20)[:, None]


def through_numpy(intervals):
    intervals.numpy()[0, 0, :, 0, 0] = range(20)


@pytest.mark.parametrize("rewrite", [own_key_alone, through_numpy])
@pytest.mark.parametrize("inference", [False, True])
def test_a_buffer_that_is_filled_anew_is_another_mask(rewrite, inference):
    with torch.inference_mode(inference):
        q, layer, batch = make_case(FORMATS["int8"], SHAPE)
        intervals = torch.zeros(1, 1, 20, 1, 2, dtype=torch.int32)
        intervals[..., 1] = torch.arange(1, 21)[:, None]
        params = AttendParams(0.125, RowIntervals(intervals))
        before = cpu.attend(q, layer, batch, params)
        assert_agrees(before, q, layer, batch, params)
        rewrite(intervals)
        after = cpu.attend(q, layer, batch, params)
        assert not torch.equal(before[0], after[0])
        assert_agrees(after, q, layer, batch, params)
        assert_agrees(torch_blockwise.attend(q, layer, batch, params), q, layer, batch, params)


def test_layers_of_a_step_share_and_others_do_not(monkeypatch):
    asked = []
    find = intervals._find
    monkeypatch.setattr(intervals, "_find", lambda *args: asked.append(1) or find(*args))
    monkeypatch.setattr(intervals, "_last", None)
    _, _, batch = make_case(FORMATS["int8"], SHAPE)
    _, _, later = make_case(FORMATS["int8"], Shape(64, 4, 2, 16, (20,), (33,)))
    rows = torch.full((1, 1, 20, 1), 20, dtype=torch.int32)
    mask, same, other = ColumnIntervals(rows), ColumnIntervals(rows), ColumnIntervals(rows - 5)
    for _ in range(3):
        intervals.intervals_of(mask, batch, 2)
        intervals.intervals_of(same, batch, 2)
    assert len(asked) == 1
    for different in ((mask, later), (other, batch), (tree_verification(0, [-1] * 20), batch)):
        intervals.intervals_of(*different, 2)
        intervals.intervals_of(mask, batch, 2)
    assert len(asked) == 7
