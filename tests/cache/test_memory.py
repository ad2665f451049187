"""Zero-filled planes, and what the system is asked for."""

import mmap
from pathlib import Path

import pytest
import torch

from quantpage.cache import memory
from quantpage.cache.memory import HUGE_PAGE, SMALLEST, zero_plane

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16])
def test_zeros_of_every_kind(dtype):
    for shape in ((3, 2, 16, 8), (5, 1 << 11, 128, 8)):
        plane = zero_plane(shape, dtype, "cpu")
        assert plane.shape == shape and plane.dtype == dtype and plane.is_contiguous()
        assert not plane.view(torch.uint8).any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
def test_huge_pages_are_asked_for_whole_and_within(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_find_advise", lambda: lambda *call: asked.append(call))
    zero_plane((SMALLEST - 1,), torch.uint8, "cpu")
    assert asked == []
    plane = zero_plane((SMALLEST,), torch.uint8, "cpu")
    ((address, size, advice),) = asked
    assert advice == mmap.MADV_HUGEPAGE
    assert address % HUGE_PAGE == 0 and size % HUGE_PAGE == 0
    start = plane.data_ptr()
    assert start <= address and address + size <= start + plane.nbytes
    assert size > SMALLEST - 2 * HUGE_PAGE


def test_a_system_without_them_gets_zeros(monkeypatch):
    monkeypatch.setattr(memory, "_find_advise", lambda: None)
    assert not zero_plane((SMALLEST,), torch.uint8, "cpu").any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a system that does not tell")
def test_a_large_plane_takes_memory_where_it_is_written():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    plane = zero_plane((64, 1 << 20), torch.uint8, "cpu")
    assert resident() - before < 8 << 20
    plane[:32] = 1
    assert resident() - before > 24 << 20
    assert not plane[32:].any()
