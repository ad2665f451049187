"""Norms of a model against Transformers' own."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quantpage.ops.triton.norm import rms_norm
from tests.ops.triton_cases import DEVICE, TIER

pytestmark = TIER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 576), (2, 3, 4, 64), (1, 80), (3, 4096), (5, 1), (0, 64)])
def test_a_norm_is_transformers(dtype, shape):
    norm = LlamaRMSNorm(shape[-1], eps=1e-5).to(DEVICE, dtype)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        x = torch.randn(shape, device=DEVICE).to(dtype) * 3
        if len(x):
            x[0] *= 1e-4
        wanted, got = norm(x), rms_norm(x, norm.weight, norm.variance_epsilon)
    # The mean's order of additions alone may differ: one number in a hundred rounds otherwise.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got, wanted, rtol=8 * step, atol=1e-30)
    if dtype == torch.float16 or (dtype == torch.bfloat16 and DEVICE != "cpu"):
        assert int((got != wanted).sum()) <= 0.01 * got.numel()


def test_rows_of_a_norm_may_lie_apart():
    x = torch.randn(4, 3, 96, device=DEVICE).to(torch.float16)[:, 1]
    weight = torch.rand(192, device=DEVICE).to(torch.float16)[::2]
    wanted = rms_norm(x.clone(), weight.clone(), 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), wanted)
