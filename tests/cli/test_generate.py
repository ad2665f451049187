"""`quantpage generate` from a model folder to the table, on a tiny model with words as tokens."""

import json
import re
import shutil
import sys
from io import StringIO

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantpage import attach, console, cpu_core
from tests.integrations.tiny_models import COMMON

pytestmark = pytest.mark.cpu


@pytest.fixture
def generate(quantpage, folder):
    """Run it on the tiny model."""

    def call(*arguments, **expected):
        given = ["--model", folder, "--max-new-tokens", "6", *arguments]
        return quantpage("generate", *given, **expected)

    return call


def rows(output):
    """Lines of the table by cache, as lists of cells."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {line[0]: line[1:] for line in cells if len(line) == 7 and line[0] != "cache"}


def test_the_answer_alone_is_on_stdout_and_what_it_took_on_stderr(generate):
    done = generate("--prompt", "w5 w6 w7 w8")
    assert re.fullmatch(r"(w\d+ )*w\d+\n", done.out)
    assert re.search(r"prompt +4 tokens in [\d.,]+ ms \([\d.]+ ms a token, [\d.]+ tokens", done.err)
    assert re.search(r"answer +5 tokens in .* after the first", done.err)
    assert "cut off at --max-new-tokens 6" in done.err
    assert "Transformers" not in done.err


def test_the_comparison_forces_the_answer_through_each_cache(generate):
    given = ["--prompt", "w5 w6 w7 w8", "--compare", "--kv-format", "int8,first1=fp8"]
    done = generate(*given, columns=80)
    found = rows(done.err)
    assert list(found) == ["int8,first1=fp8", "none", "Transformers"]
    assert found["Transformers"][-2:] == ["-", "-"] and found["Transformers"][1] == "100%"
    assert max(len(line) for line in done.err.splitlines() if line.startswith(" ")) <= 80
    data = json.loads(generate(*given, "--json").out)
    quantized, none, own = data["answers"][0]["comparison"]
    # In float32 our unquantized cache is Transformers' own up to the order of sums.
    assert none["same_token"] == 1 and none["mean_divergence"] < 1e-8 < quantized["mean_divergence"]
    assert quantized["held_bytes"] < none["held_bytes"]
    # 4 + 6 tokens, of which the last is never cached; 3 layers of 2 heads of 16 channels, K and V.
    assert own["held_bytes"] == 9 * 3 * 2 * 2 * 16 * 4
    assert none["held_bytes"] >= 64 * 3 * 2 * 2 * 16 * 4


def test_what_a_comparison_says_begins_below_the_answer(generate, monkeypatch):
    monkeypatch.setattr("sys.stderr", sys.stdout)
    lines = generate("--prompt", "w5 w6 w7 w8", "--compare").out.splitlines()
    answer = next(line for line in lines if re.fullmatch(r"(w\d+ )*w\d+", line))
    assert lines.index(answer) < lines.index("the same answer through Transformers")


def test_agreement_is_with_what_transformers_says(folder, generate):
    """The figures again, from a plain forward over prompt and answer."""
    done = generate("--prompt", "w5 w6 w7 w8", "--compare", "--kv-format", "int8", "--json")
    (answer,) = json.loads(done.out)["answers"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, *answer["answer_ids"]]])
    with torch.inference_mode():
        exact = model(ids).logits[0, 3:-1].double().log_softmax(-1)
        with attach(model, kv_format="int8"):
            ours = model(ids).logits[0, 3:-1].double().log_softmax(-1)
    wanted = (exact.exp() * (exact - ours)).sum(-1).mean().item()
    assert wanted > 1e-5
    row = answer["comparison"][0]
    assert row["mean_divergence"] == pytest.approx(wanted, rel=0.2)
    assert row["same_token"] == pytest.approx(
        (exact.argmax(-1) == ours.argmax(-1)).double().mean().item()
    )


def test_several_prompts_are_answered_in_turn_and_each_as_alone(generate):
    both = generate("--prompt", "w5 w6", "--prompt", "w9").out
    alone = [generate("--prompt", each).out for each in ("w5 w6", "w9")]
    assert both == "\n".join(alone)


def test_sampling_is_drawn_from_the_seed(generate):
    def text(*flags):
        done = generate("--prompt", "w5 w6", "--max-new-tokens", "20", "--json", *flags)
        return json.loads(done.out)["answers"][0]["text"]

    hot = ("--temperature", "1.5")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1")
    assert len({text(*hot, "--seed", seed) for seed in (1, 2, 3)}) == 3
    assert text(*hot, "--top-k", "1") == text() == text(*hot, "--top-p", "0.001")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature: expected 0 or more"),
        (["--temperature", "nan"], "temperature: expected 0 or more"),
        (["--top-p", "0.5"], "top_p: expected a temperature above 0 beside it"),
        (["--top-k", "4"], "top_k: expected a temperature above 0 beside it"),
        (["--temperature", "1", "--top-p", "1.5"], "top_p: expected more than 0"),
        (["--temperature", "1", "--top-k", "-1"], "top_k: expected 0 or more"),
        (["--stop", ""], "stop: expected some text"),
        (["--prompt", " "], "prompt: expected some text"),
        (["--prompt", "a \udcff"], r"prompt: expected text in UTF-8, got 'a \udcff'"),
        (["--system", "\udcff"], "system: expected text in UTF-8"),
        (["--stop", "\udcff"], "stop: expected text in UTF-8"),
    ],
)
def test_flags_that_cannot_be(generate, flags, message):
    assert message in generate("--prompt", "w5", *flags, code=2).err


def test_an_answer_ends_before_a_stop_text(generate):
    whole = generate("--prompt", "w5 w6").out.split()
    done = generate("--prompt", "w5 w6", "--stop", f" {whole[2]} ", "--stop", "never")
    assert done.out.split() == whole[:2] and "cut off" not in done.err
    assert generate("--prompt", "w5 w6", "--stop", "never").out.split() == whole
    data = json.loads(generate("--prompt", "w5 w6", "--stop", f" {whole[2]} ", "--json").out)
    assert data["answers"][0]["finish"] == "stop"


def test_a_system_prompt_goes_through_the_chat_template(folder, generate, tmp_path):
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    copied = shutil.copytree(folder, tmp_path / "chat")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(copied)
    given = ["--prompt", "w5 w6", "--system", "w7", "--model", copied]
    # One token for each role's letter, which no word is.
    assert "prompt      5 tokens" in generate(*given).err
    assert "prompt      3 tokens" in generate(*given, "--raw").err
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    tokenizer.save_pretrained(copied)
    assert "system: expected what the model's" in generate(*given, code=2).err


def test_the_prompt_comes_from_a_pipe_a_file_or_both(generate, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("w5 w6")
    assert "prompt      2 tokens" in generate("--file", file).err
    monkeypatch.setattr("sys.stdin", StringIO("w5 w6 w7"))
    assert "prompt      3 tokens" in generate("--file", "-").err
    assert "prompt      5 tokens" in generate("--file", file, "--prompt", "w1 w2 w3").err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00", "file: expected a text file in UTF-8"),
        (b"w5 \x00 w6", "with NUL bytes"),
        (b"", "expected some text"),
    ],
)
def test_a_file_that_is_no_prompt_is_said_in_a_sentence(generate, tmp_path, text, message):
    file = tmp_path / "prompt"
    file.write_bytes(text)
    assert message in generate("--file", file, code=2).err


def test_more_tokens_than_the_model_has_positions(generate):
    many = COMMON["max_position_embeddings"]
    said = generate("--prompt", "w5 " * (many - 3), code=2).err
    assert f"max_new_tokens: expected at most 3 after a prompt of {many - 3:,} tokens" in said
    said = generate("--prompt", "w5 w6", "--max-new-tokens", 10**9, code=2).err
    assert "expected at most 1,022 after a prompt of 2 tokens" in said
    said = generate("--prompt", "w5 " * many, code=2).err
    assert f"prompt: expected fewer than {many:,} tokens" in said


def test_int8_weights_answer_on_the_cpu(generate):
    done = generate("--prompt", "w5 w6 w7 w8", "--weights", "int8", "--dtype", "bfloat16")
    assert done.out.startswith("w") and "held in int8" in done.err


def test_who_has_no_compiled_core_is_told(generate, monkeypatch):
    monkeypatch.setattr(cpu_core, "absence", lambda: "no compiled core.")
    said = "no compiled core. Plain torch answers, more slowly."
    assert said in generate("--prompt", "w5").err
    assert "no compiled" not in generate("--prompt", "w5", "--quiet").err
    monkeypatch.undo()
    assert cpu_core.loss("cuda") == "" and (cpu_core.loss("cpu") == "") == (not cpu_core.absence())


def test_a_log_hears_that_a_model_is_loading_unless_it_is_quiet(generate):
    assert "loading" in generate("--prompt", "w5").err
    assert generate("--prompt", "w5", "--quiet").err == ""
    # And no longer than that command ran: what follows in the same process speaks again.
    assert not console.ERR.quiet
