"""Pages in memory that somebody else owns: the same results as in our own, whoever reads them."""

from dataclasses import dataclass

import pytest
import torch

# Decides, before triton is imported, whether kernels are interpreted.
from tests.ops.triton_cases import DEVICE, TIER

# isort: split
from quantpage.batch import BatchPlan, plan_batch
from quantpage.cache import CacheLayout, LayerKV
from quantpage.cache.cells import cell_bytes, exact_cell_bytes, layer_of_cells
from quantpage.cache.paged import allocate_layer
from quantpage.errors import NoImplementation
from quantpage.formats import FORMATS, KVFormat, find_format
from quantpage.hardware import DeviceInfo
from quantpage.integrations.vllm_plugin.formats import FP8
from quantpage.ops import attend as attend_op
from quantpage.ops import rope_write as write_op
from quantpage.ops.attend import AttendParams, attend
from quantpage.ops.dispatch import Call, choose
from quantpage.ops.rope_write import WriteParams

FORMS = {**FORMATS, "fp8_tensor": FP8}
ALL = [pytest.param(form, id=name) for name, form in FORMATS.items()]
ALL += [pytest.param(find_format(name), id=name) for name in ("int4_near8", "k8v4_near8")]
LIKE_OTHERS = ("int8_exact", "int8_static", "fp8_static", "k8v4_near8")
"""Their codes, scales and exact pages lie as those of other formats do."""
PAGES, EXACT_PAGES, HEADS, GROUP, WIDTHS = 9, 7, 2, 3, (64, 32)


def scales(form: KVFormat):
    """What static formats are given."""
    if form.dynamic:
        return None
    made = []
    for spec, width in zip((form.key, form.value), WIDTHS, strict=True):
        shape = spec.granularity.scale_shape(HEADS, width)
        scale = (torch.rand(shape) * 0.02 + 0.02).to(spec.scale_dtype).to(DEVICE)
        zero = torch.zeros_like(scale) if spec.zero_point else None
        made.append((scale, zero))
    return tuple(made)


def foreign(pages: int, size: int, gap: int) -> torch.Tensor:
    """uint8 [pages, HEADS, size] of 0xFF (NaN in every float), in memory with ``gap`` bytes between
    heads and three times as many between pages, and not at its beginning."""
    stride = HEADS * (size + gap) + 2 * gap
    memory = torch.full((16 + pages * stride,), 0xFF, dtype=torch.uint8, device=DEVICE)
    return memory.as_strided((pages, HEADS, size), (stride, size + gap, 1), 16)


def layers(form: KVFormat, page_size: int, dtype, gap: int = 48) -> tuple[LayerKV, LayerKV]:
    """Our own memory, and somebody else's."""
    layout = CacheLayout(HEADS, WIDTHS[0], form, page_size, dtype, WIDTHS[1])
    static = scales(form)
    exact = None
    if form.exact_pages is not None:
        exact = foreign(EXACT_PAGES, exact_cell_bytes(layout), gap)
    cells = foreign(PAGES, cell_bytes(layout), gap)
    own = allocate_layer(layout, PAGES, EXACT_PAGES, DEVICE, static)
    return own, layer_of_cells(cells, layout, static, exact)


def step(new, contexts, page_size: int, exact: bool) -> BatchPlan:
    tables, near = [[7, 2, 5], [1, 8, 3]], [[4, 0, 6], [2, 5, 1]]
    return plan_batch(new, contexts, tables, page_size, DEVICE, near if exact else None)


@dataclass(frozen=True)
class Who:
    """An implementation and what it is asked with."""

    name: str
    dtype: torch.dtype
    device: DeviceInfo


TRITON = Who("triton", torch.float16, DeviceInfo("cuda", "an interpreter", None, 1))
HOST = DeviceInfo("cpu", "this one", None, 1)
WHO = [
    pytest.param(TRITON, id="triton", marks=TIER),
    pytest.param(Who("torch", torch.float32, HOST), id="torch", marks=pytest.mark.cpu),
    pytest.param(Who("cpu", torch.float32, HOST), id="cpu", marks=pytest.mark.cpu),
]


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("form", ALL)
def test_cells_hold_what_our_own_pages_hold(form, who, page_size):
    if DEVICE == "cuda" and who.device is HOST:
        pytest.skip("reads memory of a CPU")
    interpreted = DEVICE == "cpu" and who is TRITON
    if interpreted and (page_size > 16 or form.name in LIKE_OTHERS):
        pytest.skip("one of a kind is enough for an interpreter")
    heads = HEADS if interpreted else HEADS * GROUP
    own, theirs = layers(form, page_size, who.dtype)
    exact = form.exact_pages is not None
    past = (page_size + 3, page_size - 1)
    for new, contexts in ((past, past), ((1, 4), (past[0] + 1, past[1] + 4))):
        phase = "prefill" if max(new) > 16 else "decode"
        call = Call(who.device, form, who.dtype, heads, HEADS, *WIDTHS, page_size, phase)
        try:
            write = choose(write_op.CANDIDATES, call, who.name).load()
            reader = choose([e for e in attend_op.CANDIDATES if e.name == who.name
                             and not e.refusals(call)], call, who.name)  # fmt: skip
        except (NoImplementation, ValueError) as reason:
            pytest.skip(str(reason))
        q, k, v = (
            torch.randn(sum(new), count, width, device=DEVICE).to(who.dtype)
            for count, width in ((heads, WIDTHS[0]), (HEADS, WIDTHS[0]), (HEADS, WIDTHS[1]))
        )
        got = []
        for layer in (own, theirs):
            batch = step(new, contexts, page_size, exact)
            turned = write(q, k, v, layer, batch, WriteParams()).q
            got.append(attend(turned, layer, batch, AttendParams(0.125), reader, True))
        assert torch.isfinite(got[0][0]).all()
        assert torch.equal(got[0][0], got[1][0]) and torch.equal(got[0][1], got[1][1])
    slots = batch.page_table[0, 0].item(), slice(None), slice(0, page_size)
    assert torch.equal(own.key.codes[slots], theirs.key.codes[slots])


@pytest.mark.cpu
@pytest.mark.parametrize("form", ALL)
def test_planes_fill_a_cell_and_are_aligned(form):
    for page_size in (16, 64, 256):
        layout = CacheLayout(HEADS, WIDTHS[0], form, page_size, torch.bfloat16, WIDTHS[1])
        size = cell_bytes(layout)
        cells = torch.zeros(2, HEADS, size, dtype=torch.uint8)
        # Torch hands out aligned memory, so that offsets are addresses.
        base = cells.data_ptr()
        exact = None
        if form.exact_pages is not None:
            exact = torch.zeros(2, HEADS, exact_cell_bytes(layout), dtype=torch.uint8)
        layer = layer_of_cells(cells, layout, scales(form), exact)
        planes = [layer.key.codes, layer.value.codes]
        for half in (layer.key, layer.value):
            if half.spec.dynamic:
                planes += [each for each in (half.scale, half.zero) if each is not None]
        at = 0
        for plane in planes:
            assert plane.data_ptr() - base == at and at % 16 == 0
            at += plane[0, 0].nbytes
        assert at == size and HEADS * size == layout.bytes_per_page()
        for plane in planes:
            plane[1, 1].view(torch.uint8).fill_(7)
        # Every byte of the last head, and nobody else's.
        assert (cells[1, 1] == 7).all() and cells.count_nonzero() == size


@pytest.mark.cpu
def test_memory_that_does_not_fit_is_refused():
    layout = CacheLayout(HEADS, 64, FORMATS["int4"], 16, torch.bfloat16)
    size, near = cell_bytes(layout), exact_cell_bytes(layout)
    cells = torch.zeros(3, HEADS, size, dtype=torch.uint8)
    exact = torch.zeros(3, HEADS, near, dtype=torch.uint8)
    assert layer_of_cells(cells, layout, exact=exact).exact_key is not None
    bad = torch.zeros(3 * HEADS * (size + 8) + 8, dtype=torch.uint8)
    for given, expected in (
        (cells.view(torch.int8), "bytes .torch.uint8., got torch.int8"),
        (cells[:, :1], r"\[pages, 2 kv_heads, \d+ bytes\], got \(3, 1"),
        (cells[..., :-1], r"2 kv_heads, 1152 bytes\], got \(3, 2, 1151"),
        (cells.view(-1), "expected .pages"),
        (torch.zeros(3, HEADS, size, 2, dtype=torch.uint8)[..., 0], "bytes of a cell side by side"),
        (bad.as_strided((3, HEADS, size), (HEADS * size, size, 1), 8), "16 bytes, got"),
        (bad.as_strided((3, HEADS, size), (HEADS * (size + 8), size + 8, 1)), "kv_heads at a dist"),
    ):
        with pytest.raises(ValueError, match=f"cells: .*{expected}"):
            layer_of_cells(given, layout, exact=exact)
    with pytest.raises(ValueError, match="exact: expected a tensor for format int4, got None"):
        layer_of_cells(cells, layout)
    with pytest.raises(ValueError, match=r"exact: expected .pages, 2 kv_heads, 4096"):
        layer_of_cells(cells, layout, exact=exact[..., :-16])
    plain = CacheLayout(HEADS, 64, FORMATS["int8_static"], 16)
    with pytest.raises(ValueError, match="static: expected scales for the static format"):
        layer_of_cells(torch.zeros(3, HEADS, cell_bytes(plain), dtype=torch.uint8), plain)
    with pytest.raises(ValueError, match="exact: expected None for format int8"):
        int8 = CacheLayout(HEADS, 64, FORMATS["int8"], 16)
        own = torch.zeros(3, HEADS, cell_bytes(int8), dtype=torch.uint8)
        layer_of_cells(own, int8, exact=exact)
