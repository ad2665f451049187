"""The gather kernel against the reference: every format, any span, every page size."""

from dataclasses import replace

import pytest
import torch

from quantpage.cache.views import QuantizedPages
from quantpage.formats import CODES, FORMATS, Granularity, QuantSpec
from quantpage.masks import FullMask
from quantpage.ops.gather.reference import gather_request as reference
from quantpage.ops.gather.triton import gather_request, gather_rows
from tests.ops.triton_cases import DEVICE, GPU, KERNEL_FORMATS, TIER, Step, make_step

pytestmark = TIER
SPECS = {f"{name}-{half}": getattr(FORMATS[name], half)
         for name in KERNEL_FORMATS for half in ("key", "value")}  # fmt: skip
SPECS["groups"] = QuantSpec(CODES["int4"], Granularity(group=16), zero_point=True)
SPECS["groups of int3"] = QuantSpec(CODES["int3"], Granularity(group=16), zero_point=True)


def one_request(spec, head_dim, page_size=16, context=55):
    step = Step((0, 1), (0, context), page_size, head_dim=head_dim)
    # Every slot of the context is visible, every other one poison.
    _, layer, batch = make_step(spec, spec, step, FullMask())
    return layer.key, batch.page_table[1]


@pytest.mark.parametrize(
    "name,head_dim",
    [
        *((name, width) for name in SPECS for width in (64, 80)),
        # As wide as latent rows.
        *((name, 512) for name in ("none-key", "int8-key", "fp8-key", "int4-key", "groups")),
        # Planes by the word whole, in pieces, and by the byte.
        *((name, width) for name in ("int6-key", "int3-key") for width in (96, 128, 72)),
    ],
)
def test_one_request_of_every_format(name, head_dim):
    pages, table = one_request(SPECS[name], head_dim)
    got = gather_request(pages, table, 55, torch.float16)
    # The reference multiplies in its own dtype: float64 and one rounding is the truth.
    wanted = reference(pages, table, 55, torch.float64)
    torch.testing.assert_close(got.double(), wanted, rtol=2**-10, atol=2**-12)


@pytest.mark.parametrize("name", ["int6", "int3"])
@pytest.mark.parametrize("skipped", [2, 1])
def test_planes_that_begin_between_words(name, skipped):
    pages, table = one_request(FORMATS[name].key, 64)
    memory = torch.zeros(pages.codes.numel() + skipped, dtype=torch.uint8, device=DEVICE)
    moved = memory[skipped:].view_as(pages.codes).copy_(pages.codes)
    wanted = gather_request(pages, table, 55, torch.float16)
    got = gather_request(replace(pages, codes=moved), table, 55, torch.float16)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_spans_fill_what_they_name(page_size):
    pages, table = one_request(FORMATS["int8"].key, 64, page_size, 300)
    wanted = reference(pages, table, 300, torch.float16).transpose(0, 1)
    spans = [[0, 5, 70, 300, 3], [-1, 0, 9, 9, 0], [0, 280, 40, 300, 80], [0, 40, 7, 41, 125]]
    out = torch.full((1, 140, 72), torch.nan, dtype=torch.float16, device=DEVICE)
    device_spans = torch.tensor(spans, dtype=torch.int32, device=DEVICE)
    gather_rows(pages, table[None], device_spans, 70, out[:, :, :64], first_head=1)
    assert torch.equal(out[0, 3:73, :64], wanted[1, 5:75])
    assert torch.equal(out[0, 80:100, :64], wanted[1, 280:300])
    assert torch.equal(out[0, 125, :64], wanted[1, 40])
    # Keys that nobody sees are zeros, rows that no span names are not touched.
    assert (out[0, 100:120, :64] == 0).all() and (out[0, 126:132, :64] == 0).all()
    untouched = torch.cat([out[0, :3], out[0, 73:80], out[0, 120:125], out[0, 132:]])
    assert untouched.isnan().all() and out[..., 64:].isnan().all()


def test_pages_that_the_table_does_not_have_become_zeros():
    pages, table = one_request(FORMATS["fp8"].key, 64)
    table = table.clone()
    table[1] = -1
    got = torch.empty(55, *pages.codes.shape[1::2], dtype=torch.float16, device=DEVICE)
    span = torch.tensor([[0, 0, 55, 55, 0]], dtype=torch.int32, device=DEVICE)
    gather_rows(pages, table[None], span, 55, got.transpose(0, 1))
    assert (got[16:32] == 0).all() and got[:16].abs().sum() > 0 and got[32:].abs().sum() > 0


def test_numbers_saturate():
    spec = replace(FORMATS["int8"].key, scale_dtype=torch.float32)
    codes = torch.full((1, 1, 16, 64), 100, dtype=torch.int8, device=DEVICE)
    scale = torch.full((1, 1, 16, 1), -1e6, device=DEVICE)
    table = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    got = gather_request(QuantizedPages(spec, codes, scale), table, 16, torch.float16)
    assert (got == -65504).all()


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_caches_beyond_two_to_the_31():
    spec = QuantSpec(CODES["int8"])
    pages = 2**31 // (64 * 128) + 8
    codes = torch.empty(pages, 1, 64, 128, dtype=torch.int8, device=DEVICE)
    scale = torch.ones(pages, 1, 64, 1, dtype=torch.float16, device=DEVICE)
    codes[-1] = torch.arange(128, device=DEVICE)
    table = torch.tensor([pages - 1], dtype=torch.int32, device=DEVICE)
    got = gather_request(QuantizedPages(spec, codes, scale), table, 64, torch.float16)
    assert torch.equal(got[5, 0], torch.arange(128, device=DEVICE).half())
