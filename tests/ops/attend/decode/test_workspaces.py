"""Who shares the memory that decode launches keep: one thread on one stream of one device."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
import torch

from quantpage.ops.attend.decode import workspaces
from quantpage.ops.attend.decode.workspaces import counters_of, owner_of, workspace

pytestmark = pytest.mark.cpu

CPU, THREADS = torch.device("cpu"), 8


def in_threads(act):
    """What ``act`` gives in each of some threads that are alive at once."""
    barrier = Barrier(THREADS)

    def run(_):
        barrier.wait()
        found = act()
        barrier.wait()
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def spans(tensors):
    """First and last address of each, in order."""
    return sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors)


def apart(tensors):
    held = spans(tensors)
    return all(end <= begin for (_, end), (begin, _) in pairwise(held))


def test_threads_on_one_stream_have_partial_results_of_their_own():
    owners = in_threads(lambda: owner_of(CPU))
    assert len({each.thread for each in owners}) == THREADS
    assert len({each[:2] for each in owners}) == 1
    found = in_threads(lambda: workspace(CPU, (640, 40, 24)))
    assert apart([each for three in found for each in three])


def test_threads_have_counters_of_their_own():
    for count in (5, 20_000, 300_000):
        found = in_threads(lambda count=count: counters_of(CPU, count))
        assert apart(found)
        assert all(each.numel() >= count and not each.any() for each in found)


def test_a_thread_finds_its_own_again():
    first, counters = workspace(CPU, (64, 4, 2)), counters_of(CPU, 7)
    assert [each.data_ptr() for each in workspace(CPU, (60, 4, 1))] == [
        each.data_ptr() for each in first
    ]
    assert counters_of(CPU, 6).data_ptr() == counters.data_ptr()
    # Tests before this one may have left a larger workspace to this thread.
    sizes = [each.numel() + 1 for each in first]
    larger = workspace(CPU, (sizes[0], sizes[1], sizes[2]))
    assert apart([*first, *larger]), "a captured graph may still write to the first"


def test_launches_of_unlike_shapes_share_what_is_kept(monkeypatch):
    monkeypatch.setattr(workspaces, "_workspaces", {})
    wide, long = (640, 40, 2), (64, 4, 24)
    for sizes in (wide, long):
        workspace(CPU, sizes)
    both = [each.data_ptr() for each in workspace(CPU, wide)]
    assert all([each.data_ptr() for each in workspace(CPU, s)] == both for s in (long, wide, long))


def test_steps_that_grow_keep_no_more_than_twice_the_last(monkeypatch):
    monkeypatch.setattr(workspaces, "_workspaces", {})
    for size in range(1, 200):
        last = workspace(CPU, (640 * size, 40 * size, 2 * size))
    (held,) = workspaces._workspaces.values()
    for kept, most in zip(held, last, strict=True):
        assert sum(each.numel() for each in kept) < 2 * most.numel()
    assert last[0].numel() < 2 * 640 * 199
