"""Graphs of one device: what is run before a capture, what a replay does."""

import pytest
import torch

from quantpage.cuda_graphs import GraphPool


@pytest.mark.cpu
def test_a_device_without_graphs_is_refused():
    with pytest.raises(ValueError, match="device: expected a CUDA device, got cpu"):
        GraphPool("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestGraphPool:
    def test_what_runs_before_a_capture_is_taken_back(self):
        counted, seen = torch.zeros(4, device="cuda"), []

        def run():
            seen.append(torch.cuda.is_current_stream_capturing())
            counted.add_(1)
            return counted * 2

        graph, doubled = GraphPool().capture(run, undo=counted.zero_)
        assert seen[-1] and not any(seen[:-1]) and len(seen) > 1
        assert counted.tolist() == [0] * 4
        for turn in (1, 2, 3):
            graph.replay()
            assert counted.tolist() == [turn] * 4
            assert doubled.tolist() == [2 * turn] * 4

    def test_two_graphs_of_a_pool_replay_in_turns(self):
        pool = GraphPool()
        given = torch.arange(1 << 20, device="cuda", dtype=torch.float32)
        one, sums = pool.capture(lambda: (given + 1).cumsum(0)[-1])
        two, largest = pool.capture(lambda: (given * 2).max())
        for scale in (1.0, 3.0):
            given.copy_(torch.arange(1 << 20, device="cuda") * scale)
            two.replay()
            assert float(largest) == 2 * scale * ((1 << 20) - 1)
            one.replay()
            wanted = (given.double() + 1).sum()
            assert abs(float(sums) / float(wanted) - 1) < 1e-3

    def test_what_no_graph_can_hold_raises(self):
        given = torch.ones(4, device="cuda")
        with pytest.raises(RuntimeError):
            GraphPool().capture(lambda: given * float(given.sum()))
        # The device goes on, and so do captures.
        graph, made = GraphPool().capture(lambda: given + 1)
        graph.replay()
        assert made.tolist() == [2] * 4
