"""A token of weights, and the largest of logits."""

import pytest
import torch

from quantpage.engine.sampling import draw, likeliest

pytestmark = pytest.mark.cpu


def test_tokens_are_drawn_by_their_weights():
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 6.0, 0.0])
    count, drawn = 6000, torch.zeros(6)
    for _ in range(count):
        drawn[draw(weights, generator)] += 1
    assert drawn[weights == 0].sum() == 0
    wanted = weights / weights.sum()
    spread = (wanted * (1 - wanted) / count).sqrt()
    assert ((drawn / count - wanted).abs() <= 4 * spread).all()


def test_the_end_of_the_line_is_the_last_token_with_a_weight(monkeypatch):
    nearly = torch.tensor([1 - 2**-53], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: nearly)
    for weights in ([0.1, 0.2, 0.0], [3.0, 0.7, 0.0, 0.0], [1e-30, 0.0]):
        chosen = draw(torch.tensor(weights), torch.Generator())
        assert weights[chosen] > 0 and not any(weights[chosen + 1 :])


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 0.0])
def test_weights_that_say_nothing_are_refused(odd):
    with pytest.raises(RuntimeError, match="logits: expected finite numbers, got weights"):
        draw(torch.full((4,), odd), torch.Generator())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_of_each_row(dtype):
    logits = torch.randn(5, 999, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[2, 7] = torch.nan
    logits[3] = -torch.inf
    assert likeliest(logits) == logits.argmax(-1).tolist()
    assert likeliest(logits[:0]) == []
