"""Pages further than 2^31 bytes and 2^32 bytes into their planes, in every implementation on a CPU.

All planes lie in one mapped file with holes: a page is a few kilobytes, and the next begins more
than 2 GiB later. An offset in 32 bits writes and reads elsewhere.
"""

import mmap
from dataclasses import replace

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache
from quantpage.formats import FORMATS
from quantpage.hardware import device_info
from quantpage.ops import attend as attend_op
from quantpage.ops import gather, rope_write
from quantpage.ops.attend import AttendParams, attend
from quantpage.ops.dispatch import Call
from quantpage.ops.rope_write import WriteParams

pytestmark = pytest.mark.cpu
STRIDE = (1 << 31) + (1 << 16)
PAGES, CONTEXT = 3, 40
NAMES = ("torch", "cpu")


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """Bytes of a file with holes: what nobody writes takes neither disk nor memory."""
    with open(tmp_path_factory.mktemp("far") / "pages", "w+b") as file:
        file.truncate(PAGES * STRIDE)
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)


def spread(layer, memory):
    """The layer with each page of each plane STRIDE bytes after the one before."""
    taken = 0

    def moved(plane):
        nonlocal taken
        if plane is None:
            return None
        start, taken = taken, taken + (plane[0].numel() * plane.itemsize + 4095) // 4096 * 4096
        assert taken <= 1 << 16
        size = plane.itemsize
        end = memory[start : start + (PAGES - 1) * STRIDE + plane[0].numel() * size]
        typed = end[: len(end) // size * size].view(plane.dtype)
        return typed.as_strided(plane.shape, (STRIDE // size, *plane.stride()[1:]))

    halves = [
        replace(half, codes=moved(half.codes), scale=moved(half.scale), zero=moved(half.zero))
        for half in (layer.key, layer.value)
    ]
    near = [moved(plane) for plane in (layer.exact_key, layer.exact_value)]
    return replace(layer, key=halves[0], value=halves[1], exact_key=near[0], exact_value=near[1])


def steps(name, layer, kv_format):
    """A prompt and a decode step; everything that comes back."""
    call = Call(device_info("cpu"), kv_format, torch.float32, 4, 2, 64, 64, 16)
    chosen = []
    for op in (rope_write, attend_op, gather):
        found = next(each for each in op.CANDIDATES if each.name == name)
        if reasons := found.refusals(call):
            pytest.skip(" ".join(reasons))
        chosen.append(found)
    made, table = [], [[2, 0, 1]]
    noise = torch.Generator().manual_seed(3)
    for new, context in ((39, 39), (1, CONTEXT)):
        q, k, v = (torch.randn(new, heads, 64, generator=noise) for heads in (4, 2, 2))
        exact = table if kv_format.exact_pages else None
        batch = plan_batch([new], [context], table, 16, exact_tables=exact)
        written = chosen[0].load()(q, k, v, layer, batch, WriteParams())
        made += attend(written.q, layer, batch, AttendParams(0.125), chosen[1])
    for half in (layer.key, layer.value):
        made.append(chosen[2].load()(half, batch.page_table[0], CONTEXT, torch.float32))
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format_name", ["none", "int8", "fp8", "int4"])
def test_far_pages_are_pages(far, name, format_name):
    kv_format = FORMATS[format_name]
    cache = PagedKVCache(PAGES, PAGES)
    cache.add_layer(0, CacheLayout(2, 64, kv_format, 16, torch.float32))
    near = cache.layer(0)
    wanted = steps(name, near, kv_format)
    found = steps(name, spread(near, far), kv_format)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
