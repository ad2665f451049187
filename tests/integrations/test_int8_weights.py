import pytest
import torch
from torch import nn

from quantpage.integrations.int8_weights import PROMPT_TOKENS, Int8Linear, quantize_weights

pytestmark = pytest.mark.cpu


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64, bias=False)])
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_both_paths_are_within_the_rounding(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 80, bias=bias)
    ours = Int8Linear(linear)
    x = torch.randn(2, PROMPT_TOKENS, 96)
    want = linear(x)
    many = ours.to(dtype)(x.to(dtype)) if bias else ours(x.to(dtype))
    few = torch.cat([ours(row[None].to(dtype)) for row in x.flatten(0, 1)]).view_as(want)
    assert many.dtype == few.dtype == dtype
    for got in (many.float(), few.float()):
        assert (got - want).norm() / want.norm() < 0.01


def test_a_zero_row_stays_zero():
    linear = nn.Linear(16, 16, bias=False)
    linear.weight.data[3] = 0
    assert Int8Linear(linear)(torch.randn(1, 16))[0, 3] == 0


def test_every_linear_is_replaced_and_the_embedding_kept():
    model = Tied()
    before = model.embed.weight.clone()
    assert quantize_weights(model) is model
    assert [type(each) for each in (*model.layers, model.head)] == [Int8Linear] * 3
    assert type(model.embed) is nn.Embedding and torch.equal(model.embed.weight, before)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="on the CPU, got meta"):
        quantize_weights(nn.Linear(4, 4, device="meta"))
