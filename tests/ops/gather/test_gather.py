"""Pages to dense rows, for every implementation that runs on this CPU: scale * code + zero."""

import pytest
import torch

from quantpage.cache import QuantizedPages
from quantpage.formats import FORMATS
from quantpage.formats.quantize import unpack
from quantpage.hardware import device_info
from quantpage.ops.dispatch import Call
from quantpage.ops.gather import CANDIDATES
from tests.ops.mask_cases import cached

pytestmark = pytest.mark.cpu

IMPLEMENTATIONS = [each for each in CANDIDATES if each.name != "triton"]
KV_HEADS = 2


@pytest.fixture(params=IMPLEMENTATIONS, ids=[each.name for each in IMPLEMENTATIONS])
def implementation(request):
    return request.param


def gather_of(implementation, name, head_dim=32, page_size=16):
    call = Call(
        device=device_info("cpu"),
        format=FORMATS[name],
        dtype=torch.float32,
        q_heads=4,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        value_head_dim=head_dim,
        page_size=page_size,
    )
    reasons = implementation.refusals(call)
    if reasons:
        pytest.skip(" ".join(reasons))
    return implementation.load()


def number(pages: QuantizedPages, page: int, head: int, offset: int) -> torch.Tensor:
    """One token's row by the definition, one channel at a time: [head_dim], float64."""
    row = pages.codes[page, head, offset]
    if not pages.spec.quantized:
        return row.double()
    codes = unpack(row, pages.spec.code)
    codes = codes.double()
    made = []
    for channel in range(pages.head_dim):
        planes = []
        for plane in (pages.scale, pages.zero):
            if plane is None:
                planes.append(0.0)
                continue
            group = channel * plane.shape[-1] // pages.head_dim
            if pages.spec.dynamic:
                planes.append(plane[page, head, offset, group].double())
            else:
                planes.append(plane[min(head, plane.shape[0] - 1), group].double())
        made.append(planes[0] * codes[channel] + planes[1])
    return torch.stack(made)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_what_the_definition_says(implementation, name, page_size):
    gather = gather_of(implementation, name, page_size=page_size)
    case = cached(name, [63, 150], page_size=page_size)
    for half in (case.layer.key, case.layer.value):
        for request, context in enumerate((63, 150)):
            table = torch.tensor(case.tables[request], dtype=torch.int32)
            rows = gather(half, table, context, torch.float32)
            assert rows.shape == (context, KV_HEADS, 32)
            for position in (0, 1, page_size - 1, context // 2, context - 1):
                if position >= context:
                    continue
                page, offset = table[position // page_size], position % page_size
                for head in range(KV_HEADS):
                    wanted = number(half, int(page), head, offset)
                    # One product and one sum in float32.
                    torch.testing.assert_close(
                        rows[position, head].double(), wanted, atol=1e-6, rtol=2.0**-22
                    )


@pytest.mark.parametrize("head_dim", [80, 96, 256])
@pytest.mark.parametrize("name", ["int8", "int4", "int4_static"])
def test_channels(implementation, name, head_dim):
    gather = gather_of(implementation, name, head_dim)
    case = cached(name, [17], head_dim=head_dim)
    table = torch.tensor(case.tables[0], dtype=torch.int32)
    rows = gather(case.layer.key, table, 17, torch.float32)
    for position, head in ((0, 0), (16, 1)):
        wanted = number(case.layer.key, int(table[position // 16]), head, position % 16)
        torch.testing.assert_close(rows[position, head].double(), wanted, atol=1e-6, rtol=2.0**-22)


@pytest.mark.parametrize("context", [0, 1, 15, 16, 17])
@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4"])
def test_nothing_after_the_context_is_read(implementation, name, context):
    # Slots past the context hold NaN and garbage; table entries past it point nowhere.
    gather = gather_of(implementation, name)
    case = cached(name, [context, 20])
    table = torch.tensor([*case.tables[0], 2**30], dtype=torch.int32)
    rows = gather(case.layer.key, table, context, torch.float32)
    assert rows.shape[0] == context and torch.isfinite(rows).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4", "fp8_static"])
def test_output_dtypes(implementation, name, dtype):
    gather = gather_of(implementation, name)
    case = cached(name, [40])
    table = torch.tensor(case.tables[0], dtype=torch.int32)
    rows = gather(case.layer.value, table, 40, dtype)
    exact = gather(case.layer.value, table, 40, torch.float32)
    assert rows.dtype == dtype
    # A product and a sum, each rounded to the output's dtype at worst.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(rows.float(), exact, atol=4 * unit, rtol=2 * unit)


@pytest.mark.parametrize("name", ["none", "int8", "fp8", "int4"])
def test_pages_may_be_strided(implementation, name):
    # An engine may keep a (page, head) cell as one record: strides of pages and heads are free.
    gather = gather_of(implementation, name)
    case = cached(name, [50])
    half = case.layer.key

    def spread(plane):
        if plane is None:
            return None
        source = plane.view(torch.uint8)
        wide = torch.zeros(source.shape[0] * 2, source.shape[1] + 3, *source.shape[2:])
        wide = wide.to(torch.uint8)
        wide[::2, : source.shape[1]] = source
        return wide[::2, : source.shape[1]].view(plane.dtype)

    strided = QuantizedPages(half.spec, spread(half.codes), spread(half.scale), spread(half.zero))
    assert not strided.codes.is_contiguous()
    table = torch.tensor(case.tables[0], dtype=torch.int32)
    packed = gather(half, table, 50, torch.float32)
    assert torch.equal(gather(strided, table, 50, torch.float32), packed)
