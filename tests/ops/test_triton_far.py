"""Heads and pages so far apart that 32-bit offsets wrap: kernels read and write the right place.

The memory between them is mapped and never touched; on a GPU it is allocated, up to 40 GiB a test,
so that several of these tests at once (pytest -n) do not fit one.
"""

import mmap
from dataclasses import replace

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import CAUSAL, DEVICE, GPU, TIER, Step, make_step

# isort: split
from quantpage import masks
from quantpage.batch import plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import FORMATS
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.decode import triton as triton_decode
from quantpage.ops.attend.interval import triton as triton_flash_mask
from quantpage.ops.attend.prefill import triton as triton_prefill
from quantpage.ops.attend.prefill import ways as prefill
from quantpage.ops.gather.triton import gather_request
from quantpage.ops.rope_write import WriteParams
from quantpage.ops.rope_write.triton import rope_write
from quantpage.rope import rope_table

pytestmark = TIER
APART = 2**30 + 64
"""Elements: three times as many do not fit 32 bits."""


def far(x: torch.Tensor | None, dim: int = 1) -> torch.Tensor | None:
    """The same numbers, ``dim``'s neighbours APART elements from each other."""
    if x is None or x.shape[dim] == 1:
        return x
    strides = list(x.contiguous().stride())
    strides[dim] = APART
    inner, row = x.shape[:dim], x[(0,) * (dim + 1)].numel()
    for at in reversed(range(dim)):
        strides[at] = row
        row *= x.shape[at]
    assert row <= APART, inner
    count = APART * (x.shape[dim] - 1) + row
    if x.is_cuda:
        flat = torch.empty(count, dtype=x.dtype, device=x.device)
    else:
        no_reserve = 0x4000  # A name that mmap has from Python 3.13 on.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        held = mmap.mmap(-1, count * x.element_size(), flags=flags)
        flat = torch.frombuffer(held, dtype=torch.uint8).view(x.dtype)
    moved = flat.as_strided(x.shape, strides)
    moved.copy_(x)
    return moved


def far_layer(layer: LayerKV, dim: int = 1) -> LayerKV:
    """Codes, scales, zeros and exact pages of a layer, each far apart."""

    def moved(pages: QuantizedPages) -> QuantizedPages:
        planes = [far(p, dim) if pages.spec.dynamic else p for p in (pages.scale, pages.zero)]
        return QuantizedPages(pages.spec, far(pages.codes, dim), *planes)

    near = [far(p, dim) for p in (layer.exact_key, layer.exact_value)]
    return LayerKV(moved(layer.key), moved(layer.value), *near)


@pytest.fixture(params=["heads", "pages"])
def dim(request):
    return ["pages", "heads"].index(request.param)


STEP = Step((3,), (60,), 16, kv_heads=4, group=1, head_dim=64)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("kernel", ["pages", "workspace", "intervals", "decode"])
def test_attention(kernel, name, dim, monkeypatch):
    monkeypatch.setitem(prefill.WORKSPACE_ROWS, "triton", 1 if kernel == "workspace" else 2**30)
    monkeypatch.setattr(prefill, "DECODE_TOKENS", 0)
    form = FORMATS[name]
    q, layer, batch = make_step(form.key, form.value, STEP, CAUSAL)
    params = AttendParams(0.125)
    run = triton_prefill.attend
    if kernel == "intervals":
        run = triton_flash_mask.attend
        ends = torch.randint(40, 61, (1, 4, 60, 1), dtype=torch.int32)
        params = replace(params, mask=masks.ColumnIntervals(ends, causal=True))
    elif kernel == "decode":
        run = triton_decode.attend
    wanted = run(q, layer, batch, params)
    found = run(far(q), far_layer(layer, dim), batch, params)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)


def test_gather(dim):
    _, layer, batch = make_step(FORMATS["int8"].key, FORMATS["none"].value, STEP, CAUSAL)
    moved = far_layer(layer, dim)
    for near, away in ((layer.key, moved.key), (layer.value, moved.value)):
        wanted = gather_request(near, batch.page_table[0], 60, torch.float16)
        assert torch.equal(gather_request(away, batch.page_table[0], 60, torch.float16), wanted)


@pytest.mark.parametrize("name", ["int8", "int4", "none"])
def test_write(name, dim):
    form = FORMATS[name]
    _, layer, _ = make_step(form.key, form.value, STEP, CAUSAL)
    if form.exact_pages is not None:
        shape = (4, 4, 16, 64)
        pages = [torch.zeros(shape, dtype=torch.float16, device=DEVICE) for _ in range(2)]
        layer = replace(layer, exact_key=pages[0], exact_value=pages[1])
    moved = far_layer(layer, dim)
    last = layer.key.pages - 1
    near = [[3]] if form.exact_pages is not None else None
    batch = plan_batch((3,), (7,), [[last]], 16, DEVICE, near)
    k, v = (torch.randn(3, 4, 64, device=DEVICE).half() for _ in "kv")
    q = torch.randn(3, 4, 64, device=DEVICE).half()
    params = WriteParams(rope_table(64, 64, device=DEVICE), return_rows=True)
    wanted = rope_write(q, k, v, layer, batch, params)
    found = rope_write(far(q), far(k), far(v), moved, batch, params)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one, two)
    for one, two in ((moved.key, layer.key), (moved.value, layer.value)):
        for plane in ("codes", "scale", "zero"):
            if getattr(two, plane) is not None:
                mine, theirs = getattr(one, plane)[last], getattr(two, plane)[last]
                bits = torch.uint8 if mine.element_size() == 1 else torch.int16
                assert torch.equal(mine.view(bits), theirs.view(bits))
    if form.exact_pages is not None:
        assert torch.equal(moved.exact_key[3], layer.exact_key[3])
        assert torch.equal(moved.exact_value[3], layer.exact_value[3])


@pytest.mark.skipif(GPU, reason="of the memory that the other tests map")
def test_far_is_past_32_bits():
    moved = far(torch.arange(4.0).view(1, 4, 1))
    assert moved[0, 3].data_ptr() - moved[0, 0].data_ptr() > 2**31 * 4
