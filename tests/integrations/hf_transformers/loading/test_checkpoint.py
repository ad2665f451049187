"""Model folders that are broken: one sentence each, before a token is generated."""

import json
import shutil

import pytest
import transformers as tf
from safetensors.torch import load_file, save_file

from quantpage.errors import UnsupportedModel
from quantpage.integrations.hf_transformers.loading.model import load_config, load_model
from tests.integrations.tiny_models import COMMON, save_tiny

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _lost_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def _no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def _half_a_tokenizer(folder):
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])


def _no_json(folder):
    (folder / "config.json").write_text("{ not json")


def _deep(folder):
    (folder / "config.json").write_text("[" * 100_000)


def _no_type(folder):
    (folder / "config.json").write_text('{"hidden_size": 64}')


def _unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "foo"}')


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no archive")


@pytest.mark.parametrize(
    ("breaking", "words"),
    [
        (_cut, r"model\.safetensors is broken or incomplete"),
        (_empty, r"model\.safetensors is broken or incomplete \(0 bytes"),
        (_drop_a_tensor, r"it lacks model\.layers\.1\.self_attn\.q_proj\.weight$"),
        (_wrong_shape, r"model\.norm\.weight"),
        (_no_weights, "could not load .*model"),
        (_lost_shard, r"expected .*model-00002-of-00002\.safetensors.*; it is missing"),
        (_broken_index, "expected a weight_map"),
        (_no_tokenizer, r"expected a tokenizer \(tokenizer\.json or .*, found none"),
        (_half_a_tokenizer, "could not load the tokenizer of"),
        (_no_json, r"expected JSON in .*config\.json"),
        (_deep, r"expected JSON in .*config\.json"),
        (_no_type, "to name a model_type"),
        (_unknown_type, "foo"),
        (_pickled, "could not load"),
    ],
)
def test_a_broken_folder_is_one_sentence(folder, breaking, words):
    breaking(folder)
    with pytest.raises(ValueError, match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GGUFnotreally" * 10, b"no gguf at all"])
def test_a_broken_gguf_is_one_sentence(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"could not load .*model\.gguf") as caught:
        load_model(file)
    assert "\n" not in str(caught.value)


def test_tied_weights_are_not_missing(tmp_path):
    config = tf.LlamaConfig(**COMMON, tie_word_embeddings=True)
    save_tiny(tmp_path)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(tmp_path)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tf.BertConfig(**SMALL, num_attention_heads=2), "bert: expected a decoder, got an encoder"),
        (tf.RobertaConfig(**SMALL, num_attention_heads=2), "expected a decoder, got an encoder"),
        (tf.T5Config(), "t5: expected a decoder"),
        (tf.BartConfig(), "bart: expected a decoder"),
        (tf.MambaConfig(**SMALL), "mamba: its configuration names no attention heads"),
    ],
)
def test_what_is_no_decoder_is_refused_at_load(tmp_path, config, words):
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=words):
        load_model(tmp_path)


def test_a_decoder_whose_configuration_says_that_it_is_none_is_loaded(tmp_path):
    save_tiny(tmp_path)
    config = tf.GPTNeoXConfig(**SMALL, num_attention_heads=2, intermediate_size=32)
    assert config.is_decoder is False
    tf.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == "gpt_neox"
    load_model(tmp_path)
