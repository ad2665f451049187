"""The commands as a user runs them: on a small model made here, and with wrong flags."""

import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from quantpage import cli
from quantpage.cli.capacity import parse_bytes, requests_in, tokens_in
from quantpage.formats import FORMATS, Granularity
from quantpage.integrations.hf_transformers.model import load_config, model_shape
from tests.integrations.tiny_models import tiny

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny("llama").float().save_pretrained(path)
    return path


def run(*arguments, code=0):
    """What a command prints; a failure must be one sentence that ``main`` would print."""
    done = CliRunner().invoke(cli.app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if code == 0:
        assert done.exception is None, done.exception
        return done.output
    assert done.exit_code != 0
    return str(done.exception) if not isinstance(done.exception, SystemExit) else done.output


def test_formats_lists_all(folder):
    said = run("formats", "--model", folder)
    for name in FORMATS:
        assert name in said
    # Three layers, two heads of 16 channels: K and V of int8 with a 16-bit scale each.
    assert re.search(rf"int8 .*{3 * 2 * 2 * (16 + 2)}", said)


def test_explain_says_what_runs_and_why_not():
    said = run("explain", "--device", "cpu", "--kv-format", "block_wise_fp8")
    assert "attend decode" in said and "triton: needs a CUDA device" in said and "fp8" in said
    assert "triton (decode): needs" in said and "gluon (prefill): Runs" in said, "told apart"


def test_capacity_is_what_the_layout_says(folder):
    said = run("capacity", "--model", folder, "--memory", "1MiB", "--context", "100")
    shape = model_shape(load_config(folder))
    tokens = tokens_in(1 << 20, shape, FORMATS["int8"], 64)
    assert tokens == (1 << 20) // 3 // (64 * 2 * 2 * 18) * 64
    assert f"{tokens:,}" in said
    assert requests_in(1 << 20, shape, FORMATS["int8"], 64, 100) == (1 << 20) // (3 * 2 * 64 * 72)


def test_a_format_that_does_not_fit_a_model_is_said_in_its_row(folder, monkeypatch):
    wide = replace(FORMATS["int8"].key, granularity=Granularity(48))
    monkeypatch.setitem(FORMATS, "int8_g48", replace(FORMATS["int8"], key=wide, name="int8_g48"))
    for command in (["formats"], ["capacity", "--memory", "1MiB"]):
        said = run(*command, "--model", folder)
        assert "int8_g48: not for this head_dim. group: expected a divisor of head_dim 16" in said
        assert "int4_static" in said, "the others are listed as always"


def test_explain_takes_the_heads_of_a_model(folder):
    said = run("explain", "--device", "cpu", "--kv-format", "int8", "--model", folder)
    assert "attend decode" in said
    odd = tiny("llama")
    odd.config.head_dim = 40
    odd.config.save_pretrained(folder / "odd")
    said = run("explain", "--device", "cpu", "--kv-format", "int8", "--model", folder / "odd")
    assert "head_dim must be a multiple of 16 up to 512, got 40" in said


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("40GiB", 40 << 30), ("1.5 kb", 1500), ("2MiB", 2 << 20)]
)
def test_memory_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "nowhere", "--prompt", "x"], "model: expected a folder"),
        (["generate", "--model", "nowhere"], "expected --prompt or --file"),
        (["generate", "--model", "x", "--prompt", " "], "expected some text"),
        (["generate", "--model", "x", "--prompt", "x", "--page-size", "0"], "page_size: expected"),
        (["generate", "--model", "x", "--prompt", "x", "--kv-format", "int3"], "expected one of"),
        (["generate", "--model", "x", "--prompt", "x", "--kv-format", "int8_static"], "dynamic"),
        (["generate", "--model", "x", "--file", "nowhere"], "file: expected a text file"),
        (["capacity", "--model", ".", "--memory", "1GiB"], "expected config.json or one .gguf"),
        (["capacity", "--model", ".", "--memory", "lots"], "memory: expected a number"),
        (["explain", "--mask", "some"], "mask: expected causal, full or interval"),
        (["formats", "--wrong-flag"], "No such option"),
        (["bench", "swim"], "No such command 'swim'"),
        (["bench", "cpu-model"], "the following arguments are required: --model"),
        (["bench", "decode", "--plot", "x.png"], "out: expected the CSV to draw from"),
        (["bench", "decode", "--cases", "2 x 4k"], "cases: expected names of 1 x 4k"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
    assert message in run(*arguments, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("op", ["decode", "write", "prefill", "masks", "gpu-model"])
def test_benches_of_a_gpu_say_that_there_is_none(op):
    assert "expected a CUDA device, found none" in run("bench", op, code=2)
