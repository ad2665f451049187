"""Windows, teacher-forced log-probabilities, and the figures made of them."""

import math

import pytest
import torch
from transformers import DynamicCache

import quantpage
from quantpage.evaluate.caches import unquantized
from quantpage.evaluate.score import Scores, Window, cut_windows, divergence, log_probabilities
from quantpage.formats import FORMATS
from tests.integrations.oracle import oracle
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu


class Letters:
    """A tokenizer whose token is a letter."""

    def __call__(self, text, return_tensors):
        ids = torch.tensor([[ord(letter) for letter in text]])
        return type("Encoded", (), {"input_ids": ids})


def test_windows_start_at_paragraphs_and_are_spread():
    text = "\n\n".join(letter * 40 for letter in "abcdefgh")
    windows = cut_windows(Letters(), text, count=2, prompt=6, scored=4)
    assert [chr(window.tokens[0, 0]) for window in windows] == ["a", "f"]
    assert all(window.tokens.shape == (1, 10) and window.scored == 4 for window in windows)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(
        ValueError, match="at least 100 tokens in window 1 of 2 before the next, got 75"
    ):
        cut_windows(Letters(), "x" * 150, count=2, prompt=50, scored=50)


@pytest.mark.parametrize(
    ("text", "count", "got"),
    [("x" * 199, 2, 99), ("x" * 900, 100_000, 0), ("x" * 150 + "\n\n" + "y" * 99, 2, 99)],
)
def test_a_token_is_in_one_window_alone(text, count, got):
    with pytest.raises(ValueError, match=f"in window [12] of {count}.*, got {got};"):
        cut_windows(Letters(), text, count, prompt=50, scored=50)


def test_windows_may_fill_a_text():
    windows = cut_windows(Letters(), "".join(map(chr, range(200, 500))), 3, prompt=60, scored=40)
    assert torch.cat([each.tokens for each in windows], 1).tolist() == [list(range(200, 500))]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_log_probabilities_are_those_of_one_forward(chunk):
    model, window = tiny("llama"), Window(tokens(1, 40), prompt=17)
    with unquantized(model) as new_cache:
        found = log_probabilities(model, window, new_cache, chunk)
    with torch.inference_mode():
        logits = model(window.tokens, use_cache=False).logits[0, 16:-1]
    assert found.shape == (23, 128) and found.dtype == torch.float32
    torch.testing.assert_close(found, logits.log_softmax(-1).float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if each.dynamic])
def test_scores_through_pages_equal_a_dense_control(name):
    model, window = tiny("llama"), Window(tokens(1, 90), prompt=50)
    with quantpage.attach(model, kv_format=name, page_size=16) as attached:
        found = log_probabilities(model, window, attached.new_cache, 8)
    with oracle(model, FORMATS[name], 16):
        wanted = log_probabilities(model, window, DynamicCache, 8)
    with unquantized(model) as new_cache:
        exact = log_probabilities(model, window, new_cache, 8)
    loss = float(divergence(exact, wanted).mean())
    assert float(divergence(wanted, found).mean()) <= max(1e-9, 1e-3 * loss)
    # Were the cache not in use, the divergence of a quantized format would be nothing.
    assert (loss > 1e-7) == FORMATS[name].quantized


def test_divergence_is_kl_and_survives_small_differences():
    p, q = torch.randn(2, 5, 1000).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(
        q.double(), p.double(), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(divergence(p, q), wanted, atol=1e-6, rtol=0)
    assert (divergence(p, p) == 0).all()
    # Half the squared relative difference; each log-probability is normalized in float32.
    wide = torch.randn(1, 1000)
    near = wide + 1e-4 * torch.randn(1, 1000)
    found = divergence(wide.log_softmax(-1), near.log_softmax(-1))
    assert 1e-9 < float(found) < 2e-8


def test_figures_over_several_windows():
    exact = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()
    scores = Scores()
    scores.add(Window(torch.tensor([[9, 0, 1]]), prompt=1), exact, other)
    scores.add(Window(torch.tensor([[9, 2, 2]]), prompt=1), exact, exact)
    assert scores.tokens == 4
    assert scores.top1 == 0.75
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert scores.mean_divergence == pytest.approx(kl / 4)
    assert scores.p99_divergence == pytest.approx(kl * 0.97, rel=1e-3)
    assert scores.most_divergence == pytest.approx(kl)
    assert scores.mean_overlap == pytest.approx(1 - 0.25 / 4)
    loss = -(math.log(0.25) + math.log(0.8) + math.log(0.25) + math.log(0.1)) / 4
    assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-6)


def test_how_sure_a_mean_is():
    noise = torch.Generator().manual_seed(1)
    even = Scores(divergences=[torch.rand(512, generator=noise), torch.rand(500, generator=noise)])
    low, high = even.sure_divergence()
    assert low < even.mean_divergence < high < 1.1 * low
    # The same mean, all of it one token's: of texts of the kind some have none.
    peak = torch.zeros(1012)
    peak[700] = 1012 * even.mean_divergence
    low, high = Scores(divergences=[peak]).sure_divergence()
    assert low == 0.0 and high > 2 * even.mean_divergence
    assert even.sure_divergence() == even.sure_divergence()
    assert Scores(divergences=[torch.tensor([3.0])]).sure_divergence() == (3.0, 3.0)
    assert even.median_divergence == pytest.approx(0.5, abs=0.05)
