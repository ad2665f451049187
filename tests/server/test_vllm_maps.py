"""A model whose keys have biases, served by vLLM in few bits: its keys are measured before."""

import json
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from quantpage.errors import UnsupportedModel
from quantpage.formats import FORMATS
from quantpage.integrations.hf_transformers.keys.calibration import Calibration
from quantpage.integrations.hf_transformers.keys.key_maps import AUTO, find_key_maps
from quantpage.integrations.vllm_plugin.here import VllmHere
from quantpage.server import vllm
from quantpage.server.options import ServeOptions
from tests.server.small import save_small

pytestmark = pytest.mark.cpu

HERE = VllmHere("0.33.0", cpu=False, own_names=True, architectures=frozenset({"Qwen2ForCausalLM"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Qwen2 beside the tokenizer of the small Llama."""
    path = save_small(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, initializer_range=0.2))
    for name, weight in model.named_parameters():
        if name.endswith("k_proj.bias"):
            weight.data.normal_(std=5)
    model.save_pretrained(path)
    return path


def test_the_file_holds_what_attach_makes_by_itself(folder, monkeypatch, capsys):
    monkeypatch.setattr(vllm, "find_vllm", lambda: HERE)
    command = vllm.choose("vllm", ServeOptions(str(folder), "int4"), ())
    told = dict(pairwise(command.arguments))
    path = json.loads(told["--additional-config"])["quantpage_calibration"]
    assert "measuring the keys of" in capsys.readouterr().err
    found = Calibration.load(path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found.check(model, path)
    formats = [FORMATS["int4"]] * 2
    wanted = find_key_maps(model, formats, AUTO).layers
    made = found.maps(formats, path)
    assert made.keys() == wanted.keys() == {0, 1}
    for index, each in made.items():
        assert each.feedback is not None and each.digest() == wanted[index].digest()
        assert each.mean.abs().max() > 1


def test_a_model_that_cannot_be_measured_asks_for_a_file(folder, monkeypatch, capsys):
    def refuse(path):
        raise UnsupportedModel(f"{path}: expected another")

    monkeypatch.setattr(vllm, "find_vllm", lambda: HERE)
    monkeypatch.setattr(vllm, "load_model", refuse)
    options = ServeOptions(str(folder), "int4")
    with pytest.raises(ValueError, match="calibration: expected a file or none"):
        vllm.choose("vllm", options, ())
    # Who left the engine to us gets the one that can.
    assert vllm.choose("auto", options, ()) is None
    assert "embedded engine (calibration: expected" in capsys.readouterr().err.replace("\n", " ")


def test_a_model_larger_than_the_memory_asks_for_a_file(folder, monkeypatch):
    monkeypatch.setattr(vllm, "available_bytes", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"calibration: expected a file or none .* 1,000 of memory"
    ):
        vllm.measure_maps(str(folder), "int4")
