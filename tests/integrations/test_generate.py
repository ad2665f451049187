"""`quantpage generate` from a model folder to the table, on a tiny model with words as tokens."""

import re

import pytest
from typer.testing import CliRunner

from quantpage import cli
from tests.integrations.tiny_models import COMMON, save_tiny

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def run(folder, *arguments, **kwargs):
    given = ["generate", "--model", str(folder), "--max-new-tokens", "6", *arguments]
    return CliRunner().invoke(cli.app, given, env={"COLUMNS": "200"}, **kwargs)


def rows(output):
    """Lines of the table by cache, as lists of cells."""
    cells = [re.split(r"\s*[│┃]\s*", line.strip("│┃ ")) for line in output.splitlines()]
    return {line[0]: line[1:] for line in cells if len(line) == 6 and line[0] != "cache"}


def test_the_answer_and_what_it_took(folder):
    done = run(folder, "--prompt", "w5 w6 w7 w8", "--compare", "--kv-format", "int4,first1=int8")
    assert done.exception is None, done.exception
    assert re.match(r"w\d+", done.stdout), "the answer comes first, and alone on stdout"
    assert "4 prompt tokens" in done.output
    found = rows(done.output)
    assert list(found) == ["int4,first1=int8", "none"]
    assert re.fullmatch(r"[\d.]+% of tokens, KL [\d.e+-]+", found["int4,first1=int8"][-1])
    quantized, plain = (int(each[0].replace(",", "")) for each in found.values())
    assert quantized < plain


def test_an_unquantized_cache_agrees_with_none_at_all(folder):
    """The comparison itself: what --compare teacher-forces is the same model."""
    done = run(folder, "--prompt", "w9 w3 w50", "--compare", "--kv-format", "int8_exact")
    assert rows(done.output)["int8_exact"][-1].startswith("100.0% of tokens, KL")


def test_the_prompt_comes_from_a_pipe_a_file_or_both(folder, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("w5 w6")
    assert "2 prompt tokens" in run(folder, "--file", str(file)).output
    assert "3 prompt tokens" in run(folder, "--file", "-", input="w5 w6 w7").output
    assert "5 prompt tokens" in run(folder, "--file", str(file), "--prompt", "w1 w2 w3").output


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"\xff\xfe\x00", "file: expected a text file in UTF-8"), (b"", "expected some text")],
)
def test_a_file_that_is_no_prompt_is_said_in_a_sentence(folder, tmp_path, text, message):
    file = tmp_path / "prompt"
    file.write_bytes(text)
    done = run(folder, "--file", str(file))
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


def test_a_prompt_beyond_the_model_says_how_long_it_may_be(folder):
    done = run(folder, "--prompt", "w5 " * COMMON["max_position_embeddings"])
    assert "expected at most 1018 tokens beside 6 new ones" in str(done.exception)


def test_int8_weights_answer_on_the_cpu(folder):
    done = run(folder, "--prompt", "w5 w6 w7 w8", "--weights", "int8", "--dtype", "bfloat16")
    assert done.exception is None and "int8" in rows(done.output)
