"""Texts that are measured as if they stood further on."""

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from quantpage.formats import FORMATS
from quantpage.integrations.hf_transformers.keys import statistics
from quantpage.integrations.hf_transformers.keys.calibration import calibrate
from quantpage.integrations.hf_transformers.keys.statistics import (
    Placed,
    longest_context,
    measure,
    measure_random,
    placed,
)
from tests.integrations.tiny_models import COMMON, tiny, tokens

pytestmark = pytest.mark.cpu


def test_texts_are_placed_over_the_context_near_positions_denser():
    texts = [tokens(1, 100, seed) for seed in range(6)]
    found = placed(texts, 1600)
    assert [each.first for each in found] == [0, 0, 100, 300, 700, 1500]
    assert all(each.tokens is text for each, text in zip(found, texts, strict=True))
    for count, context in ((6, 100), (6, 30), (1, 1600), (2, 1600)):
        assert {each.first for each in placed(texts[:count], context)} == {0}
    assert [each.first for each in placed(texts[:3], 1600)] == [0, 0, 1500]
    assert placed([], 1600) == []


@pytest.mark.parametrize("name", ["llama", "gemma3_window", "glm_partial_rotary"])
def test_a_text_that_is_placed_has_the_keys_that_it_has_there(name):
    """Keys of the first layer hang on nothing but a token and where it stands."""
    model, long = tiny(name, torch.float32), tokens(1, 150)
    cache = DynamicCache()
    with torch.inference_mode():
        model(long, past_key_values=cache)
    wanted = cache.layers[0].keys[0, :, 104:].double().mean(1)
    found = measure(model, [Placed(long[:, 100:], 100)], skipped=4)[0]
    torch.testing.assert_close(found.mean, wanted, atol=1e-5, rtol=1e-5)
    assert found.tokens == 46
    # The first key of a text is that of position 0.
    assert [len(measure(model, [Placed(long, x)], 4)[0].first_keys) for x in (0, 100)] == [1, 0]


def test_a_placed_model_attends_as_it_does_from_the_start():
    model, ids = tiny("llama", torch.float64), tokens(1, 200)
    one, other = (measure(model, [Placed(ids, at)], 64)[0] for at in (0, 300))
    scores = [torch.einsum("hij,hij->h", x.query_products, x.key_products) for x in (one, other)]
    # What queries see far away, as shares: the same, though all is turned by other angles.
    for name in ("query_products", "far_products", "key_products"):
        here, there = (getattr(x, name) for x in (one, other))
        assert not torch.allclose(here, there, rtol=1e-3)
        traces = (x.diagonal(dim1=1, dim2=2).sum(1) for x in (here, there))
        torch.testing.assert_close(*traces, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(*scores, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (tf.LlamaConfig(**COMMON), COMMON["max_position_embeddings"]),
        (tf.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=96), 96),
        (tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=1, n_head=2), 0),
        (
            tf.LlamaConfig(
                **COMMON,
                rope_parameters={
                    "rope_type": "dynamic",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 128,
                },
            ),
            128,
        ),
    ],
)
def test_texts_are_placed_no_further_than_a_model_goes(config, wanted):
    model = tf.AutoModelForCausalLM.from_config(config)
    assert longest_context(model) == wanted


def test_random_tokens_are_placed_too(monkeypatch):
    """Where a model has no further positions they are one text, as long as it can be."""
    seen = []
    monkeypatch.setattr(
        statistics, "measure", lambda _, texts, skipped: seen.append(texts) or measure(_, [], 0)
    )
    model = tiny("llama", torch.float32)
    for limit in (8192, 2000, 300):
        model.config.max_position_embeddings = limit
        measure_random(model)
    bloom = tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=1, n_head=2)
    measure_random(tf.AutoModelForCausalLM.from_config(bloom))
    firsts = [[each.first for each in texts] for texts in seen]
    sizes = [{each.tokens.shape[1] for each in texts} for texts in seen]
    assert firsts == [[0, 0, 936, 3584], [0, 0, 500, 1488], [0, 0, 0, 0], [0]]
    assert sizes == [{512}, {512}, {300}, {1024}]


def test_a_mean_of_near_positions_alone_is_none_further_on():
    """A bias turns with the position, slowly in slow pairs."""
    model = tiny("qwen2_bias", torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.zero_()
                # A pair that turns once in two thousand positions.
                parameter.view(-1, 16)[:, [5, 13]] = 40.0
    texts, lost = [tokens(1, 100, seed) for seed in range(4)], []
    for given in (placed(texts, 100), placed(texts, 900)):
        made = calibrate(model, given, [FORMATS["int4"]] * 3, {}).layers[0].key_map
        there = measure(model, [Placed(tokens(1, 100, 9), 600)], 4)[0].mean
        lost.append((there - made.mean).norm())
    assert lost[1] < 0.9 * lost[0]
