"""A token of weights, and the largest of logits."""

import pytest
import torch

from quantpage.engine import Request, Sampling
from quantpage.engine.sampling import Sampler, draw, likeliest

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


def test_tokens_that_weigh_next_to_nothing_are_drawn_too():
    """A hundred thousand of them, between two that weigh something, and some of no weight."""
    weights = torch.full((200_003,), 1e-6)
    weights[[0, -1]] = 0.1
    weights[1:200_001:2] = 0.0
    generator, count = torch.Generator().manual_seed(0), 600
    drawn = torch.tensor([draw(weights, generator) for _ in range(count)])
    assert (weights[drawn] > 0).all()
    small = drawn[(drawn > 0) & (drawn < 200_002)]
    # A third of the mass, evenly.
    assert abs(len(small) - count / 3) <= 4 * (count * 2 / 9) ** 0.5
    assert abs(float((small < 100_000).double().mean()) - 0.5) <= 4 * (0.25 / len(small)) ** 0.5
    assert len(small.unique()) > 0.95 * len(small)


def test_weights_that_are_rounded_otherwise_draw_the_same():
    """A number on a line of all weights would fall to other tokens for 7 seeds."""
    noise = torch.Generator().manual_seed(0)
    logits = torch.randn(49_152, generator=noise) * 3
    moved = logits * (1 + 1e-5 * torch.randn(logits.shape, generator=noise))
    draws = [
        [draw(given.softmax(-1), torch.Generator().manual_seed(seed)) for seed in range(200)]
        for given in (logits, moved)
    ]
    assert sum(a != b for a, b in zip(*draws, strict=True)) <= 1


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 0.0])
def test_weights_that_say_nothing_are_refused(odd):
    with pytest.raises(RuntimeError, match="logits: expected finite numbers, got weights"):
        draw(torch.full((4,), odd), torch.Generator())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_of_each_row(dtype):
    logits = torch.randn(5, 999, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1] = 0
    logits[1, [7, 9]] = 1
    wanted = logits.argmax(-1)
    logits[2, 7] = torch.nan
    logits[3] = -torch.inf
    logits[4, 0] = torch.inf
    wanted[2:] = -1
    assert likeliest(logits) == wanted.tolist()
    assert likeliest(logits[:0]) == []


def test_biases_and_penalties_are_of_one_answer_alone():
    """Answers to one prompt share its logits, which log-probabilities are read from afterwards."""
    given = torch.tensor([0.0, 2.0, 0.0, 1.5])
    sampling = Sampling(temperature=0, logit_bias=((3, 1.0),), presence_penalty=2.0)
    request = Request((0,), 4, sampling, answers=2, logprobs=0)
    logits, told = given.clone(), given.log_softmax(-1)
    for answer in range(2):
        sampler = Sampler(request, answer)
        # Token 3 at 2.5, then at 0.5 behind token 1, then at 0.5 beside it at 0.
        made = [sampler.choose(logits) for _ in range(3)]
        assert [each.token for each in made] == [3, 1, 3]
        assert [each.logprob for each in made] == told[[3, 1, 3]].tolist()
        assert logits.equal(given)


@pytest.mark.parametrize("temperature", [0, 1])
def test_nothing_ends_an_answer_before_its_least_tokens(temperature):
    request = Request(
        (0,), 4, Sampling(temperature=temperature), stop_tokens=frozenset([1, 3]), min_tokens=2
    )
    sampler = Sampler(request, 0)
    logits = torch.tensor([0.0, 90.0, 1.0, 80.0])
    assert not sampler.plain
    made = [sampler.choose(logits).token for _ in range(3)]
    assert {1, 3}.isdisjoint(made[:2]) and made[2] == 1
    with pytest.raises(ValueError, match="min_tokens: expected 0 to 4, got 5"):
        Request((0,), 4, min_tokens=5)
