"""A needle in a text, and the model's own answers under another cache."""

import pytest
import torch

from quantpage.evaluate.answers import draw_answer, noise, same_tokens
from quantpage.evaluate.caches import find_candidates, unquantized
from quantpage.evaluate.needle import judge, make_needles
from quantpage.evaluate.score import Scores, Window, apart, log_probabilities
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu


class Characters:
    """A tokenizer whose tokens are characters, after a token that begins a text."""

    def __call__(self, text, add_special_tokens=True, return_tensors="pt"):
        ids = [1] * add_special_tokens + [ord(each) for each in text]
        made = type("Encoding", (), {})()
        made.input_ids = torch.tensor([ids])
        return made


def test_needles_stand_where_they_are_said_to():
    text = "x" * 2000
    cells = list(make_needles(Characters(), text, [300, 600], [0.0, 0.5, 1.0]))
    assert [(each.length, each.depth) for each in cells] == [
        (n, depth) for n in (300, 600) for depth in (0.0, 0.5, 1.0)
    ]
    keys = set()
    for each in cells:
        ids = each.window.tokens[0].tolist()
        words = "".join(map(chr, ids[1:]))
        answer = "".join(map(chr, ids[each.window.prompt :]))
        assert len(ids) == each.length and ids[0] == 1
        assert words.count(answer.strip()) == 3 and words.endswith(f"The pass key is{answer}")
        before = words.index("\n\nThe pass key") / words.count("x")
        assert before == pytest.approx(each.depth, abs=0.01)
        keys.add(answer)
    assert len(keys) == len(cells)


def test_needles_that_have_no_room_are_refused():
    with pytest.raises(ValueError, match="needle lengths: expected more than the 1"):
        list(make_needles(Characters(), "x" * 900, [90], [0.5]))
    with pytest.raises(ValueError, match="text: expected at least"):
        list(make_needles(Characters(), "x" * 90, [400], [0.5]))


def test_a_needle_is_found_where_every_token_of_it_is_the_most_likely():
    window = Window(torch.tensor([[5, 6, 2, 0]]), 2)
    likely = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]).log()
    assert judge(window, likely).right
    assert judge(window, likely).probability == pytest.approx(0.42)
    likely[1] = torch.tensor([0.4, 0.5, 0.1]).log()
    assert not judge(window, likely).right


def test_noise_draws_by_probability():
    p = torch.tensor([0.6, 0.3, 0.1]).double()
    drawn = torch.stack([(p.log() + noise(3, step, 3)).argmax() for step in range(3000)])
    assert torch.allclose(drawn.bincount().double() / 3000, p, atol=0.03)
    assert torch.equal(noise(1, 2, 9), noise(1, 2, 9))
    assert not torch.equal(noise(1, 2, 9), noise(1, 3, 9))


def test_a_forced_answer_tells_where_a_run_of_its_own_would_part():
    """The claim of the module: found without the second run, and checked with one."""
    model = tiny("llama", torch.float32)
    (candidate,) = find_candidates(model.config, ["int4"], 16)
    parted = 0
    for seed in range(6):
        prompt = Window(tokens(1, 60, seed=seed), 60)
        answer = draw_answer(model, prompt, 24, seed)
        with unquantized(model) as new_cache:
            own = log_probabilities(model, answer, new_cache, 8)
        assert same_tokens(answer, own, seed).all()
        with candidate.attaching(model) as new_cache:
            same = same_tokens(answer, log_probabilities(model, answer, new_cache, 8), seed)
        run = draw_answer(model, prompt, 24, seed, candidate.attaching).tokens[0, 60:]
        until = int(same.long().cumprod(0).sum())
        assert torch.equal(run[:until], answer.tokens[0, 60:][:until])
        if until < 24:
            parted += 1
            assert run[until] != answer.tokens[0, 60 + until]
    assert parted >= 2


def test_overlap_is_the_probability_that_stays():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    _, found = apart(p.log(), q.log())
    assert float(found) == pytest.approx(0.75)
    scores, window = Scores(), Window(torch.tensor([[1, 0, 1]]), 1)
    pair = p.clamp_min(1e-9).log().expand(2, 3), q.log().expand(2, 3)
    scores.add(window, *pair)
    assert scores.mean_overlap == pytest.approx(0.75)
    assert scores.most_divergence == pytest.approx(float(torch.cat(scores.divergences).max()))
    # Slices change nothing.
    wide = torch.randn(300, 50).log_softmax(-1), torch.randn(300, 50).log_softmax(-1)
    moved = (wide[0].double().exp() - wide[1].double().exp()).abs().sum(-1) / 2
    torch.testing.assert_close(apart(*wide)[1], 1 - moved)
