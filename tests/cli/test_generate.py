"""`quantpage generate` from a model folder to the table, on a tiny model with words as tokens."""

import re
from io import StringIO

import pytest

from tests.integrations.tiny_models import COMMON

pytestmark = pytest.mark.cpu


@pytest.fixture
def generate(quantpage, folder):
    """Run it on the tiny model."""

    def call(*arguments, code=0):
        given = ["--model", folder, "--max-new-tokens", "6", *arguments]
        return quantpage("generate", *given, code=code)

    return call


def rows(output):
    """Lines of the table by cache, as lists of cells."""
    cells = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in output.splitlines()]
    return {line[0]: line[1:] for line in cells if len(line) == 6 and line[0] != "cache"}


def test_the_answer_and_what_it_took(generate):
    done = generate("--prompt", "w5 w6 w7 w8", "--compare", "--kv-format", "int4,first1=int8")
    assert re.fullmatch(r"(w\d+|<\w+>)( (w\d+|<\w+>))*", done.out.strip()), "nothing but the answer"
    assert "4 prompt tokens" in done.err
    found = rows(done.err)
    assert list(found) == ["int4,first1=int8", "none"]
    assert re.fullmatch(r"[\d.]+% of tokens, KL [\d.e+-]+", found["int4,first1=int8"][-1])
    quantized, plain = (int(each[0].replace(",", "")) for each in found.values())
    assert quantized < plain


def test_an_unquantized_cache_agrees_with_none_at_all(generate):
    """The comparison itself: what --compare teacher-forces is the same model."""
    done = generate("--prompt", "w9 w3 w50", "--compare", "--kv-format", "int8_exact")
    assert rows(done.err)["int8_exact"][-1].startswith("100.0% of tokens, KL")


def test_the_prompt_comes_from_a_pipe_a_file_or_both(generate, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("w5 w6")
    assert "2 prompt tokens" in generate("--file", file).err
    monkeypatch.setattr("sys.stdin", StringIO("w5 w6 w7"))
    assert "3 prompt tokens" in generate("--file", "-").err
    assert "5 prompt tokens" in generate("--file", file, "--prompt", "w1 w2 w3").err


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
    assert "int8" in rows(done.err)


def test_a_log_hears_that_a_model_is_loading_unless_it_is_quiet(generate):
    assert "loading" in generate("--prompt", "w5").err
    assert generate("--prompt", "w5", "--quiet").err == ""
