"""gather in the compiled core against its reference, in every instruction set."""

from dataclasses import replace

import pytest
import torch

from quantpage.formats import FORMATS
from quantpage.ops.gather import cpu as cpu_gather
from quantpage.ops.gather.reference import gather_request
from tests.ops.cpu_cases import AVAILABLE, Shape, make_case

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not AVAILABLE, reason="no compiled core in this installation"),
]

SHAPE = Shape(128, 6, 2, 16, (5, 1, 3), (5, 20, 40))


@pytest.mark.parametrize("name", FORMATS)
def test_gather(name):
    torch.manual_seed(3)
    _, layer, batch = make_case(FORMATS[name], replace(SHAPE, head_dim=80))
    for request, context in enumerate(SHAPE.context_lens):
        table = batch.page_table[request]
        for pages in (layer.key, layer.value):
            want = gather_request(pages, table, context, torch.float32)
            for isa in AVAILABLE:
                got = cpu_gather.gather_request(pages, table, context, torch.float32, isa)
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
            short = cpu_gather.gather_request(pages, table, context, torch.bfloat16)
            assert torch.equal(short, got.to(torch.bfloat16))
