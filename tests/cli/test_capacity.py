"""`quantpage capacity` and `formats`: what is promised is what attach holds; what is refused."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as tf

from quantpage import attach
from quantpage.cache.sizes import longest_in
from quantpage.cli.capacity import parse_bytes, row_of
from quantpage.formats import FORMATS, Granularity
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.sizes import cache_shape
from tests.integrations.tiny_models import COMMON, tiny, tokens

pytestmark = pytest.mark.cpu

LLAMA = ("--layers", "32", "--kv-heads", "8", "--head-dim", "128")


@pytest.fixture
def capacity(quantpage):
    """Its data."""

    def call(*arguments):
        return json.loads(quantpage("capacity", *arguments, "--json").out)

    return call


def by_format(data):
    return {row["format"]: row for row in data["rows"]}


def test_what_is_promised_is_what_is_held(capacity, folder):
    given = ("--model", folder, "--memory", "1MiB", "--context", "200", "--page-size", "16")
    names = "none,int8,int4,first1=int8"
    rows = by_format(capacity(*given, "--formats", names))
    assert list(rows) == ["none", "int8", "int4,first1=int8"]
    model = tiny("llama", torch.float32)
    for name, row in rows.items():
        with attach(model, name, page_size=16), torch.inference_mode():
            cache = model(tokens(1, 200)).past_key_values
            assert cache.peak_bytes() <= row["prompt_bytes"]
            cache.flush()
        assert row["request_bytes"] == cache.used_bytes()
        assert row["sixteen_bit_bytes"] == cache.unquantized_bytes()


def test_what_fits_fits_and_one_more_does_not():
    config = tf.Gemma3TextConfig(
        **COMMON, head_dim=32, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    for name in ("none", "int8", "int4"):
        plans = cache_shape(config).layers(LayerFormats.parse(name), 16)
        for budget in (10_000, 100_000, 3_000_000):
            row = row_of(name, plans, 500, budget, 100, 40)
            held, peak = row.request_bytes, row.prompt_bytes
            assert row.requests >= 0
            if row.requests:
                assert (row.requests - 1) * held + peak <= budget < row.requests * held + peak
            else:
                assert peak > budget
            longest = longest_in(plans, budget)
            assert sum(plan.held_bytes(longest) for plan in plans) <= budget
            assert sum(plan.held_bytes(longest + 1) for plan in plans) > budget


def test_a_few_numbers_instead_of_a_model(capacity):
    rows = by_format(capacity(*LLAMA, "--memory", "40GiB"))
    # 32 layers, 8 heads, a key and a value of 128 numbers: 2 bytes each, or 1 and a 2-byte scale.
    assert rows["none"]["bytes_per_token"] == 32 * 8 * 2 * 256
    assert rows["int8"]["bytes_per_token"] == 32 * 8 * 2 * 130
    assert rows["int8"]["requests"] == (40 << 30) // (8192 * 32 * 8 * 2 * 130)
    half = by_format(capacity(*LLAMA, "--memory", "40GiB", "--tp", "2"))
    assert half["int8"]["request_bytes"] * 2 == rows["int8"]["request_bytes"]


def test_a_configuration_alone_serves(capacity, folder, tmp_path):
    config = tmp_path / "config.json"
    config.write_bytes((folder / "config.json").read_bytes())
    of_file, of_folder = (
        capacity("--model", path, "--memory", "1GiB") for path in (config, folder)
    )
    assert of_file == of_folder and len(of_file["rows"]) == len(FORMATS)


def test_weights_are_taken_off(capacity, quantpage, folder):
    given = ("--model", folder, "--memory", "1GiB")
    none, sixteen, eight = (
        capacity(*given, "--weights", kind)["weight_bytes"] for kind in ("none", "bf16", "int8")
    )
    model = tiny("llama", torch.float32)
    assert sixteen == 2 * sum(each.numel() for each in model.parameters())
    assert none == 0 < eight < sixteen
    said = quantpage(
        "capacity", "--model", folder, "--memory", "100KiB", "--weights", "bf16", code=2
    )
    assert "memory: expected more than the weights" in said.err


def test_states_of_other_layers_are_counted_and_named(quantpage, capacity, tmp_path):
    tf.Qwen3NextConfig().save_pretrained(tmp_path)
    given = ("--model", tmp_path, "--memory", "40GiB", "--formats", "int8")
    data = capacity(*given)
    assert list(data["state_bytes"]) == ["linear_attention"]
    assert data["rows"][0]["request_bytes"] > data["state_bytes"]["linear_attention"] > 1 << 20
    said = quantpage("capacity", *given).out
    assert "linear_attention: 74.2 MiB of states" in said and "12 layers of 2 kv_heads" in said


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tf.BertConfig(), "expected a decoder"),
        (tf.T5Config(), "expected a decoder"),
        (tf.MambaConfig(), "names no attention heads"),
        (
            tf.LlamaConfig(**COMMON | {"num_key_value_heads": 3}),
            "multiple of its 3 kv_heads, got 4",
        ),
    ],
)
def test_models_that_attach_refuses_are_refused(quantpage, tmp_path, config, words):
    config.save_pretrained(tmp_path)
    for command in (["capacity", "--memory", "1GiB"], ["formats"], ["explain"]):
        assert words in quantpage(*command, "--model", tmp_path, code=2).err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_hidden_layers": "3"}, "expected int, got str"),
        ({"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types`"),
        ({"hidden_size": None}, "expected int, got NoneType"),
        ({"num_attention_heads": 0}, "could not load"),
        ({"num_key_value_heads": 0}, "could not load"),
        ({"head_dim": 0}, "could not load"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_one_sentence(quantpage, folder, tmp_path, wrong, words):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    for command in (["capacity", "--memory", "1GiB"], ["formats"]):
        said = quantpage(*command, "--model", tmp_path, code=2).err
        assert said.startswith("quantpage: ") and words in said and said.count("\n") == 1


def test_a_window_of_one_token(capacity, quantpage, tmp_path):
    tf.MistralConfig(**COMMON, sliding_window=1).save_pretrained(tmp_path)
    given = ("--model", tmp_path, "--memory", "1MiB", "--formats", "int8")
    (row,) = capacity(*given)["rows"]
    assert row["sixteen_bit_bytes"] == 0 < row["request_bytes"]
    assert "int8" in quantpage("capacity", *given).out


def test_a_format_that_does_not_fit_a_model_is_said_beside_the_others(
    quantpage, folder, monkeypatch
):
    wide = replace(FORMATS["int8"].key, granularity=Granularity(48))
    monkeypatch.setitem(FORMATS, "int8_g48", replace(FORMATS["int8"], key=wide, name="int8_g48"))
    for command in (["formats"], ["capacity", "--memory", "1MiB"]):
        said = quantpage(*command, "--model", folder).out
        assert "int8_g48: not for this" in said
        assert "group: expected a divisor of head_dim 16" in said
        assert "int4_static" in said, "the others are listed as always"


@pytest.mark.parametrize("columns", [80, 200])
def test_the_tables_fit_a_terminal(quantpage, folder, columns):
    for command in (["capacity", *LLAMA, "--memory", "40GiB"], ["formats", "--model", folder]):
        table = quantpage(*command, columns=columns).out.splitlines()
        rows = [line for line in table if line.split()[:1] and line.split()[0] in FORMATS]
        assert len(rows) >= len(FORMATS) and max(map(len, rows)) <= columns
        assert "\N{HORIZONTAL ELLIPSIS}" not in "".join(table)


def test_formats_lists_all_in_words_and_as_data(quantpage, folder):
    said = quantpage("formats").out
    assert all(name in said for name in FORMATS) and "also called auto" in said
    data = json.loads(quantpage("formats", "--model", folder, "--json").out)
    sizes = {row["format"]: row["bytes_per_token"] for row in data["formats"]}
    # Three layers, two heads of 16 channels: K and V of int8 with a 16-bit scale each.
    assert sizes["int8"] == 3 * 2 * 2 * (16 + 2) and data["head_dim"] == 16
    data = json.loads(quantpage("formats", "--head-dim", "64", "--json").out)
    assert {row["format"]: row["bits_per_value"] for row in data["formats"]}["int8"] == "8.25"


@pytest.mark.parametrize(
    ("text", "size"), [("1B", 1), ("40GiB", 40 << 30), ("1.5 kb", 1500), ("2Mi", 2 << 20)]
)
def test_memory_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots", *LLAMA], "memory: expected a number and a unit"),
        (["--memory", "80", *LLAMA], "memory: expected a number and a unit"),
        (["--memory", "0GiB", *LLAMA], "memory: expected a number and a unit"),
        (["--memory", "-1GiB", *LLAMA], "memory: expected a number and a unit"),
        (["--memory", "1GiB"], "model: expected --model, or all of --layers"),
        (["--memory", "1GiB", *LLAMA[:4]], "got no head_dim"),
        (["--memory", "1GiB", "--model", "x", *LLAMA], "layers: expected no number beside --model"),
        (["--memory", "1GiB", *LLAMA, "--weights", "int8"], "weights: expected none without"),
        (["--memory", "1GiB", *LLAMA, "--weights", "int2"], "weights: expected bf16, int8 or none"),
        (["--memory", "1GiB", *LLAMA, "--page-size", "17"], "page_size: expected one of"),
        (["--memory", "1GiB", *LLAMA, "--tp", "0"], "'--tp'"),
        (
            ["--memory", "1GiB", *LLAMA, "--tp", "3"],
            "tp: expected a number that divides 8 kv_heads",
        ),
        (["--memory", "1GiB", *LLAMA, "--context", "0"], "'--context'"),
        (["--memory", "1GiB", *LLAMA, "--chunk", "0"], "'--chunk'"),
        (["--memory", "1GiB", *LLAMA, "--formats", "int9"], "kv_format: expected one of"),
        (["--memory", "1GiB", *LLAMA, "--formats", "int8,layers=40:int4"], "layers of 0 to 31"),
    ],
)
def test_wrong_flags_are_one_sentence(quantpage, arguments, message):
    assert message in quantpage("capacity", *arguments, code=2).err
