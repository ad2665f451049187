"""Zero-filled planes, and what the system is asked for."""

import mmap

import pytest
import torch

from quantpage.cache import memory
from quantpage.cache.memory import HUGE_PAGE, SMALLEST, zero_plane

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16])
def test_zeros_of_every_kind(dtype):
    plane = zero_plane((3, 2, 16, 8), dtype, "cpu")
    assert plane.shape == (3, 2, 16, 8) and plane.dtype == dtype and plane.is_contiguous()
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
