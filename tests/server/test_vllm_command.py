"""Which of our options are which flags of vLLM's server, and what keeps to the embedded engine."""

import json
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from quantpage.errors import Unavailable
from quantpage.integrations.vllm_plugin.formats import exact_page, format_of
from quantpage.integrations.vllm_plugin.here import VllmHere
from quantpage.server import vllm
from quantpage.server.options import ServeOptions
from quantpage.server.vllm import ServedModel, build_command, choose, describe
from tests.server.small import save_small

pytestmark = pytest.mark.pure

NEW = VllmHere("0.33.0", cpu=False, own_names=True, architectures=frozenset({"LlamaForCausalLM"}))
OLD_CPU = replace(NEW, version="0.32.0", cpu=True, own_names=False)
LLAMA = ServedModel(("LlamaForCausalLM",), 128, torch.bfloat16)
BEGIN = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "models/one"]
COMMON = [*BEGIN, "--served-model-name", "one", "--host", "127.0.0.1", "--port", "8000"]


def built(here=NEW, model=LLAMA, more=(), **given):
    return list(build_command(ServeOptions("models/one", **given), model, here, more).arguments)


def test_the_usual_command():
    chosen = ["--attention-backend", "CUSTOM", "--kv-cache-dtype", "quantpage_int8"]
    assert built() == [*COMMON, *chosen, "--block-size", "64"]
    # On a CPU the plugin stands in the place of vLLM's backend; before 0.33 vLLM's names choose.
    wanted = [*COMMON, "--kv-cache-dtype", "int8_per_token_head", "--block-size", "64"]
    assert built(OLD_CPU) == wanted


def test_every_option_has_its_flag_and_what_comes_after_is_last():
    made = built(
        name="mine",
        host="0.0.0.0",
        port=9000,
        context=4096,
        max_requests=8,
        step_tokens=512,
        dtype="float16",
        memory=3 << 30,
        prefix_cache=False,
        allow_origins=("http://one", "http://two"),
        more=("--tensor-parallel-size", "2"),
    )
    pairs = dict(pairwise(made))
    assert pairs["--served-model-name"] == "mine" and pairs["--host"] == "0.0.0.0"
    assert pairs["--port"] == "9000" and pairs["--max-model-len"] == "4096"
    assert pairs["--max-num-seqs"] == "8" and pairs["--max-num-batched-tokens"] == "512"
    assert pairs["--dtype"] == "float16" and pairs["--kv-cache-memory-bytes"] == str(3 << 30)
    assert json.loads(pairs["--allowed-origins"]) == ["http://one", "http://two"]
    assert made[-3:] == ["--no-enable-prefix-caching", "--tensor-parallel-size", "2"]


def test_an_empty_key_is_none_that_anybody_could_send():
    with pytest.raises(ValueError, match="api_key: expected a key, or none"):
        ServeOptions("models/one", api_key="")


def test_memory_and_key_go_where_they_are_read_and_the_key_is_not_shown(capsys, monkeypatch):
    options = ServeOptions("models/one", memory=3 << 30, api_key="hidden")
    command = build_command(options, LLAMA, OLD_CPU)
    assert command.environment == {"VLLM_API_KEY": "hidden", "VLLM_CPU_KVCACHE_SPACE": "3"}
    became = []
    monkeypatch.setattr("os.execve", lambda *given: became.append(given))
    vllm.become(command)
    ((path, arguments, environment),) = became
    assert path == sys.executable and arguments == command.arguments
    assert environment["VLLM_API_KEY"] == "hidden"
    said = capsys.readouterr().err
    assert "--model models/one" in said and "hidden" not in said


@pytest.mark.parametrize("here", [NEW, OLD_CPU])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kv_format", ["none", "int8", "fp8", "int4", "k8v4", "int8_exact"])
def test_the_plugin_takes_the_dtype_and_the_block_size(kv_format, head_dim, here):
    model = replace(LLAMA, head_dim=head_dim)
    made = built(here, model, kv_format=kv_format)
    pairs = dict(pairwise(made))
    additional = json.loads(pairs.get("--additional-config", "{}"))
    form = format_of(pairs.get("--kv-cache-dtype", "auto"), additional)
    assert form.name == kv_format
    block = int(pairs["--block-size"])
    if form.exact_pages is None:
        assert block == 64
    else:
        assert exact_page(form, block, (head_dim, head_dim), torch.bfloat16) == 64
        # No smaller block takes such a page.
        for smaller in range(64, block, 64):
            assert exact_page(form, smaller, (head_dim, head_dim), torch.bfloat16) < 64


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_format": "int4,first1=int8"}, "kv_format: expected one for all layers"),
        ({"kv_format": "k=int8,v=fp8"}, "kv_format: expected one for all layers"),
        ({"kv_format": "fp8_static"}, "kv_format: expected one for all layers"),
        ({"device": "cpu"}, "device: expected what vLLM"),
        ({"max_waiting": 5}, "max_waiting: expected"),
        ({"weights": "int8"}, "weights: expected"),
        ({"port": 0}, "port: expected"),
        ({"model": replace(LLAMA, gguf=True)}, r"got a \.gguf file"),
        ({"model": replace(LLAMA, architectures=("OwnForCausalLM",))}, "got OwnForCausalLM"),
        (
            {"calibration": "keys", "more": ("--additional_config.more=1",)},
            "flags after --: expected no --additional-config beside",
        ),
    ],
)
def test_what_vllm_does_not_do_is_said_by_its_name(given, said):
    with pytest.raises(ValueError, match=said):
        built(**given)


def test_a_calibration_goes_to_the_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = {"quantpage_calibration": str(tmp_path / "keys")}
    made = dict(pairwise(built(kv_format="int4", calibration="keys")))
    assert json.loads(made["--additional-config"]) == wanted
    made = dict(pairwise(built(OLD_CPU, kv_format="k8v4", calibration="keys")))
    assert json.loads(made["--additional-config"]) == wanted | {"quantpage": "k8v4"}
    for calibration in ("auto", "none"):
        assert "--additional-config" not in built(kv_format="int4", calibration=calibration)
    # Nothing of it is quantized.
    assert "--additional-config" not in built(kv_format="none", calibration="keys")
    assert "--additional-config" in built(more=("--additional-config", "{}"))


@pytest.mark.parametrize(
    ("kv_format", "traits", "calibration", "asks"),
    [
        ("int4", ("biases",), "auto", True),
        ("int4_near8", ("norms",), "auto", True),
        ("int4", (), "auto", False),
        ("int4", ("biases",), "none", False),
        ("int4", ("biases",), "keys", False),
        ("k8v4", ("biases",), "auto", False),
        ("none", ("biases",), "auto", False),
    ],
)
def test_which_models_are_measured(kv_format, traits, calibration, asks):
    options = ServeOptions("models/one", kv_format, calibration=calibration)
    assert vllm.asks_for_maps(options, replace(LLAMA, key_traits=traits)) == asks


def test_without_vllm_the_embedded_engine_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(vllm, "find_vllm", lambda: None)
    options = ServeOptions("models/one")
    assert choose("auto", options, ()) is None
    said = capsys.readouterr().err.replace("\n", " ")
    assert "embedded engine (vLLM is not installed" in said and "no speculative decoding" in said
    with pytest.raises(Unavailable, match="vLLM is not installed"):
        choose("vllm", options, ())
    with pytest.raises(ValueError, match="flags after --: expected none for the embedded engine"):
        choose("embedded", options, ("--tensor-parallel-size", "2"))
    with pytest.raises(ValueError, match="engine: expected auto, vllm or embedded"):
        choose("best", options, ())


def test_with_vllm_the_model_decides(monkeypatch, capsys, tmp_path):
    folder = str(save_small(tmp_path))
    assert describe(folder) == ServedModel(("LlamaForCausalLM",), 16, torch.float32)
    monkeypatch.setattr(vllm, "find_vllm", lambda: NEW)
    options = ServeOptions(folder)
    assert choose("auto", options, ("--seed", "1")).arguments[-2:] == ("--seed", "1")
    assert choose("embedded", options, ()) is None
    other = replace(NEW, architectures=frozenset())
    monkeypatch.setattr(vllm, "find_vllm", lambda: other)
    assert choose("auto", options, ()) is None
    assert "expected one that vLLM 0.33.0 serves" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(ValueError, match="expected one that vLLM"):
        choose("vllm", options, ())
