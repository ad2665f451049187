"""Key maps of attached models: where they come from, and what they are good for."""

import warnings
from dataclasses import replace
from weakref import WeakKeyDictionary

import accelerate
import pytest
import torch
import transformers as tf
from transformers import DynamicCache

import quantpage
from quantpage.errors import UnsupportedModel
from quantpage.integrations.hf_transformers.keys import key_maps
from quantpage.integrations.hf_transformers.keys.calibration import layers_of_weights
from quantpage.integrations.hf_transformers.keys.statistics import (
    has_key_biases,
    has_uneven_key_norms,
    measure,
    measure_random,
)
from tests.integrations.tiny_models import COMMON, tiny, tokens

pytestmark = pytest.mark.cpu


def biased(config=None, size=60.0):
    """A model with a few large numbers in its key biases, as Qwen2.5 has."""
    if config is None:
        model = tiny("qwen2_bias", torch.float32)
    else:
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.normal_(std=0.5)
                # Slow pairs, whose angle hardly moves.
                parameter.view(-1, 16)[:, [7, 15]] = size
    return model


@torch.inference_mode()
def last_logits(model, ids, cache=None):
    return model(ids, past_key_values=cache, use_cache=True).logits[0, 16:].float().log_softmax(-1)


def divergence(exact, other):
    return (exact.exp() * (exact - other)).sum(-1).mean().item()


def with_and_without_maps(model, kv_format):
    """How far predictions are from the unquantized, by calibration."""
    ids = tokens(1, 120)
    exact = last_logits(model, ids, DynamicCache())
    found = {}
    for calibration in ("auto", None):
        with quantpage.attach(
            model, kv_format=kv_format, page_size=16, calibration=calibration
        ) as attached:
            found[calibration] = divergence(exact, last_logits(model, ids))
        assert ("weights" in attached.calibration) == (calibration == "auto")
    return found


@pytest.mark.parametrize("kv_format", ["int8", "int4", "fp8", "k8v4"])
def test_large_key_biases_no_longer_hurt(kv_format):
    found = with_and_without_maps(biased(), kv_format)
    # What is left of k8v4 is its values.
    assert found["auto"] < (0.6 if kv_format == "k8v4" else 0.2) * found[None]


def test_codes_of_few_bits_are_rounded_in_turn_without_a_text(monkeypatch):
    """Each layer by its own format; what is measured once serves every attachment."""
    model, looked = biased(), []
    monkeypatch.setattr(
        key_maps, "measure_random", lambda each: looked.append(each) or measure_random(each)
    )
    digests = set()
    for kv_format, wanted in (
        ("int4,first1=int8", {0: False, 1: True, 2: True}),
        ("k8v4,last1=int6", {0: False, 1: False, 2: True}),
        ("int4,first1=none", {1: True, 2: True}),
    ):
        with quantpage.attach(model, kv_format) as attached:
            maps = attached.options.key_maps
            assert {i: each.feedback is not None for i, each in maps.items()} == wanted
            digests.add(maps[2].digest())
    # int4, and int6 of keys that no near page hides.
    assert len(digests) == 2 and looked == [model]


def test_rounding_in_turn_without_a_text_is_nearer():
    model, ids = biased(), tokens(1, 300, seed=9)
    exact = last_logits(model, ids, DynamicCache())
    found = {}
    for in_turn in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not in_turn:
                patch.setattr(key_maps, "layers_of_weights", without_feedback)
            # What another attachment made would be taken.
            patch.setattr(key_maps, "_measured", WeakKeyDictionary())
            with quantpage.attach(model, "k=int4,v=int8", page_size=16):
                found[in_turn] = divergence(exact, last_logits(model, ids))
    assert found[True] < 0.9 * found[False]


def without_feedback(*given):
    return {i: replace(each, metric=None) for i, each in layers_of_weights(*given).items()}


def test_only_models_with_key_biases_are_measured():
    for name, wanted in (("llama", False), ("qwen2_bias", True), ("gpt_oss_sinks", True)):
        model = tiny(name, torch.float32)
        assert has_key_biases(model) == wanted
        with quantpage.attach(model) as attached:
            assert bool(attached.options.key_maps) == wanted
    model = tiny("qwen2_bias", torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.zero_()
    assert not has_key_biases(model)


def uneven(name="qwen3_norm"):
    """A model whose norms of keys have a few large gains, as Gemma 3 has."""
    model = tiny(name, torch.float32)
    with torch.no_grad():
        for each, gain in model.named_parameters():
            if each.endswith(("q_norm.weight", "k_norm.weight")):
                gain.normal_(1.0, 0.1)
                gain[[7, 15]] = 0.05 if each.endswith("q_norm.weight") else 40.0
    return model


@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_large_gains_of_key_norms_no_longer_hurt(kv_format):
    found = with_and_without_maps(uneven(), kv_format)
    assert found["auto"] < 0.5 * found[None]


def test_norms_of_keys_are_measured_where_their_gains_differ():
    model = tiny("qwen3_norm", torch.float32)
    assert not has_uneven_key_norms(model)
    with quantpage.attach(model) as attached:
        assert not attached.options.key_maps
    model = uneven()
    assert has_uneven_key_norms(model) and not has_key_biases(model)
    with quantpage.attach(model) as attached:
        assert len(attached.options.key_maps) == model.config.num_hidden_layers


def test_a_softcap_keeps_the_mean():
    config = tf.Gemma2Config(**COMMON, head_dim=16, attention_bias=True, sliding_window=24)
    model, ids = biased(config, 3.0), tokens(1, 60)
    exact = last_logits(model, ids, DynamicCache())
    with quantpage.attach(model, page_size=16) as attached:
        assert all(each.mean is None for each in attached.options.key_maps.values())
        assert len(attached.options.key_maps) == 3
        assert divergence(exact, last_logits(model, ids)) < 1e-2


def test_measuring_changes_nothing():
    model = biased()
    model.train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state, name = torch.get_rng_state(), model.config._attn_implementation
    with quantpage.attach(model):
        pass
    assert model.training and all(each.training for each in model.modules())
    assert model.config._attn_implementation == name
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], each) for key, each in model.state_dict().items())


def test_weights_that_changed_are_measured_again():
    model = biased()
    maps = []
    for _ in range(2):
        with quantpage.attach(model) as attached:
            maps.append(attached.options.key_maps[0])
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.bias.mul_(2)
    assert not torch.equal(maps[0].mean, maps[1].mean)


def test_statistics_are_those_of_the_models_own_keys():
    model, ids = tiny("llama", torch.float32), tokens(1, 50)
    found = measure(model, [ids], skipped=4)
    cache = DynamicCache()
    last_logits(model, ids, cache)
    assert sorted(found) == [0, 1, 2]
    for index, layer in enumerate(cache.layers):
        keys = layer.keys[0, :, 4:].double()
        torch.testing.assert_close(found[index].mean, keys.mean(1), atol=1e-5, rtol=1e-5)
        assert found[index].tokens == 46


def test_a_model_that_cannot_be_measured_is_told_of():
    """Bloom's attention is its own code, and its keys have biases."""
    config = tf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.self_attention.query_key_value.bias.normal_()
    told = {}
    for calibration in ("auto", None):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attached = quantpage.attach(model, calibration=calibration)
        attached.detach()
        assert not attached.options.key_maps
        told[calibration] = [str(each.message) for each in said if "biases" in str(each.message)]
    assert len(told["auto"]) == 1 and "cannot be measured" in told["auto"][0]
    assert not told[None]


def test_a_cache_goes_on_with_the_map_that_it_was_written_by(tmp_path):
    model, ids = biased(), tokens(1, 60)
    with quantpage.attach(model, page_size=16) as attached:
        cache = attached.new_cache()
        model(ids[:, :40], past_key_values=cache, use_cache=True)
        attached.save_cache(cache, tmp_path / "pages")
        wanted = model(ids[:, 40:], past_key_values=cache, use_cache=True).logits
    with quantpage.attach(model, page_size=16, calibration=None) as attached:
        cache = attached.load_cache(tmp_path / "pages")
        got = model(ids[:, 40:], past_key_values=cache, use_cache=True).logits
    assert torch.equal(got, wanted)


def test_foreign_attention_reads_keys_as_they_were():
    model, ids = biased(), tokens(1, 40)
    with quantpage.attach(model, page_size=16) as attached:
        cache = attached.new_cache()
        model(ids, past_key_values=cache, use_cache=True)
        read = cache.layers[0].dequantized("key")
    plain = DynamicCache()
    model(ids, past_key_values=plain, use_cache=True)
    keys = plain.layers[0].keys
    assert (read - keys).abs().max() < 0.05 * keys.abs().max()
    assert (read - keys).abs().mean() < 0.03


def test_an_unknown_calibration_is_refused():
    with pytest.raises(FileNotFoundError, match="calibration: expected 'auto', 'none' or a file"):
        quantpage.attach(tiny("llama", torch.float32), calibration="later")


def test_a_model_whose_weights_are_brought_for_each_forward_is_measured():
    plain, kept = tiny("qwen2_bias", torch.float32), tiny("qwen2_bias", torch.float32)
    accelerate.cpu_offload(kept, execution_device=torch.device("cpu"))
    assert {each.device.type for each in kept.parameters()} == {"meta"}
    ids, maps = tokens(1, 30), []
    for model in (plain, kept):
        with quantpage.attach(model, "int4", page_size=16) as attached, torch.inference_mode():
            maps.append(attached.options.key_maps)
            model(ids)
    assert maps[0].keys() == maps[1].keys() and maps[0]
    for index, each in maps[0].items():
        torch.testing.assert_close(maps[1][index].scale, each.scale)
        torch.testing.assert_close(maps[1][index].mean, each.mean)
    with torch.device("meta"):
        empty = tf.Qwen2ForCausalLM(plain.config)
    with pytest.raises(UnsupportedModel, match="got a model on meta, whose weights are not loaded"):
        quantpage.attach(empty)
