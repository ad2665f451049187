"""`quantpage evaluate` from a model folder to its files."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import quantpage
from quantpage.cli.app import run
from quantpage.errors import FormatError
from quantpage.evaluate import caches, table
from quantpage.evaluate.caches import ours
from quantpage.evaluate.run import EvaluateRequest, evaluate
from quantpage.evaluate.text import default_path
from quantpage.formats import FORMATS, ExactPages
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.keys.calibration import calibrate
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose tokens are words w3 .. w127, and a text of them."""
    path = tmp_path_factory.mktemp("model")
    vocabulary = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    tiny("llama", torch.float32).save_pretrained(path)
    words = torch.randint(3, 128, (1000,), generator=torch.Generator().manual_seed(3))
    (path / "words.txt").write_text(" ".join(f"w{i}" for i in words.tolist()))
    return path


def small(folder, **changes):
    settings = {"windows": 2, "prompt": 40, "scored": 30, "chunk": 16, "page_size": 16}
    settings["text"] = folder / "words.txt"
    return EvaluateRequest(str(folder), **{**settings, **changes})


def test_rows_come_in_order_with_figures_that_make_sense(folder):
    names = ("none", "int8_per_token_head", "int4", "k8v4")
    rows = evaluate(small(folder, formats=names))
    assert [row.cache for row in rows] == list(names)
    assert all(row.tokens == 60 for row in rows)
    none, int8, int4, k8v4 = rows
    assert none.kl_mean < 1e-6 and none.top1 == 1.0 and none.bits_per_value == 16
    assert none.kl_mean < int8.kl_mean < int4.kl_mean
    assert none.bytes_per_token > int8.bytes_per_token > k8v4.bytes_per_token > int4.bytes_per_token
    # 3 layers, 2 heads, keys and values of 16 channels, a 2-byte scale each.
    assert int8.bytes_per_token == 3 * 2 * 2 * (16 + 2)
    assert int4.sixteen_bit_tokens == "<= 64"
    assert none.perplexity == pytest.approx(int8.perplexity, rel=0.2)


@pytest.mark.parametrize("name", ["int3", "k8v4", "int4_near8"])
def test_the_first_prediction_that_reads_codes(name):
    model, ids = tiny("llama", torch.float32), tokens(1, 100)
    candidate = ours(model.config, name, 16, "none")
    found = []
    # Against what reads the same exact pages: all of the text in two of them.
    for page_size in (16, 64):
        with quantpage.attach(model, name, page_size=page_size, calibration=None) as attached:
            logits = model(ids, past_key_values=attached.new_cache()).logits[0]
            found.append(logits.detach())
    differ = (found[0] - found[1]).abs().amax(-1) > 1e-5
    assert differ.nonzero().min() == candidate.codes_from == 48


@pytest.mark.parametrize(
    ("name", "prompt", "untold"),
    [("int4", 20, 29), ("int4_near8", 25, 24), ("int4", 49, 0), ("int4", 1, 30), ("int8", 1, 0)],
)
def test_predictions_that_read_no_code_are_told(folder, capsys, name, prompt, untold):
    evaluate(small(folder, formats=(name, "int4,first1=int8"), windows=1, prompt=prompt))
    said = [line for line in capsys.readouterr().err.splitlines() if "kept exact" in line]
    assert len(said) == (untold > 0)
    assert all(line.startswith(f"{name}: {untold} of 30 predictions") for line in said)


def test_a_choice_a_layer_is_a_row_of_its_own(folder):
    names = ("int4", "int4,first1=none", "k=int8,v=int4,layers=1-2:int8", "int8")
    four, mixed, pair, eight = evaluate(small(folder, formats=names, prompt=80))
    assert mixed.bytes_per_token == (2 * four.bytes_per_token + 3 * 2 * 2 * 16 * 2) / 3
    assert mixed.bits_per_value == pytest.approx((2 * four.bits_per_value + 16) / 3)
    assert mixed.kl_mean < four.kl_mean and mixed.sixteen_bit_tokens == "<= 64"
    assert pair.bytes_per_token == pytest.approx(
        (2 * eight.bytes_per_token + (eight.bytes_per_token + four.bytes_per_token) / 2) / 3
    )


def test_choices_may_be_formats_of_ones_own(folder):
    mine = replace(FORMATS["int8"], name="mine", exact_pages=ExactPages())
    rows = evaluate(small(folder, formats=(mine, LayerFormats.parse("int8,first1=none"))))
    assert [row.cache for row in rows] == ["mine", "int8,first1=none"]
    assert rows[0].sixteen_bit_tokens == "<= 64"


def test_the_command_writes_csv_and_markdown(folder, tmp_path, capsys):
    arguments = ["evaluate", "--model", str(folder), "--text", str(folder / "words.txt")]
    arguments += [
        "--formats",
        "none, fp8,last1=int8",
        "--windows",
        "1",
        "--prompt",
        "20",
        "--scored",
        "12",
    ]
    arguments += ["--csv", str(tmp_path / "new" / "a.csv"), "--markdown", str(tmp_path / "a.md")]
    assert run(arguments) == 0
    done = capsys.readouterr()
    assert "12 tokens of words.txt" in done.out
    assert "loading" in done.err and "window 1 of 1" in done.err
    with (tmp_path / "new" / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["cache"] for row in rows] == ["none", "fp8,last1=int8"]
    assert rows[1]["tokens"] == "12" and rows[1]["torch"] == torch.__version__
    assert (tmp_path / "a.md").read_text().count("\n") == 4
    assert list(tmp_path.rglob("*.part")) == []


def test_the_rows_as_data(folder, capsys):
    given = ["evaluate", "--model", str(folder), "--text", str(folder / "words.txt"), "--json"]
    given += ["--formats", "int8", "--windows", "1", "--prompt", "20", "--scored", "12"]
    assert run(given) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["cache"] == "int8" and row["tokens"] == 12 and row["kl_mean"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"formats": ("int9",)}, FormatError, "got 'int9'"),
        ({"formats": ("fp8_static",)}, FormatError, "static scales for fp8_static"),
        ({"windows": 0}, ValueError, "windows: expected at least 1, got 0"),
        ({"dtype": "int8"}, ValueError, "dtype: expected one of float32"),
        ({"device": "tpu"}, ValueError, "device: expected auto, cpu, cuda"),
        ({"page_size": 17}, ValueError, "page_size: expected one of"),
        ({"prompt": 1000}, ValueError, "prompt, scored: expected at most 1,024 tokens together"),
        ({"prompt": 900, "windows": 5}, ValueError, "text: expected at least 930 tokens in window"),
    ],
)
def test_bad_requests_fail_in_one_sentence(folder, changes, error, words):
    with pytest.raises(error, match=words):
        evaluate(small(folder, **changes))


def test_scales_of_a_checkpoint_are_scored(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    scales = calibrate(tiny("llama", torch.float32), [tokens(1, 400)],
                       [FORMATS["fp8_static"]] * 3, {}).static  # fmt: skip
    planes = {}
    for index, each in scales.items():
        name = f"model.layers.{index}.self_attn"
        planes[f"{name}.k_scale"] = each.key_scale.float().flatten()
        planes[f"{name}.v_scale"] = each.value_scale.float().flatten()
    save_file(planes, model / "scales.safetensors")
    (row,) = evaluate(small(model, formats=("fp8_static",)))
    assert row.cache == "fp8_static" and 0 < row.kl_mean < 0.2


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="text: expected a text file, got"):
        evaluate(small(folder, text=tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match="model: expected"):
        evaluate(EvaluateRequest(str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"w5 \xff", "invalid start byte"), (b"w5 \0", "NUL bytes"), (b" \n", "nothing in it")],
)
def test_a_text_that_is_none_is_refused_before_the_model_is_loaded(
    folder, tmp_path, monkeypatch, content, words
):
    file = tmp_path / "text"
    file.write_bytes(content)
    monkeypatch.setattr("quantpage.evaluate.run.load_model", None)
    with pytest.raises(ValueError, match=f"text: expected a text in UTF-8, .*{words}"):
        evaluate(small(folder, text=file))


@pytest.mark.parametrize("flag", ["--csv", "--markdown"])
def test_files_that_cannot_be_written_are_said_before_the_model_is_loaded(
    folder, tmp_path, monkeypatch, capsys, flag
):
    monkeypatch.setattr("quantpage.evaluate.run.load_model", None)
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file" / "a.csv"):
        given = ["--text", str(folder / "words.txt"), flag, str(target)]
        assert run(["evaluate", "--model", str(folder), *given]) == 2
        assert f"{flag[2:]}: expected a file" in capsys.readouterr().err


def test_the_novels_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "quantpage" / "austen.txt"


def test_peers_need_their_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq", None)
    monkeypatch.setattr(caches, "_installed", lambda package: package != "hqq")
    with pytest.raises(ValueError, match="hf-hqq4 needs the package hqq"):
        evaluate(small(folder, formats=("hf-hqq4",)))
    assert "hf-hqq8" not in caches.default_names()
    assert "int8" in caches.default_names() and "fp8_static" not in caches.default_names()


def test_csv_keeps_small_figures(folder):
    (row,) = evaluate(small(folder, formats=("fp8",), windows=1, scored=8))
    (read,) = csv.DictReader(table.to_csv([row]).splitlines())
    assert float(read["kl_mean"]) == pytest.approx(row.kl_mean, rel=1e-5)
    assert set(read) == set(type(row).__slots__)


def test_the_terminals_table_cuts_no_figure(folder):
    (row,) = evaluate(small(folder, formats=("int8_exact",), windows=1))
    wide = [
        replace(
            row, cache="hf-quanto4", bytes_per_token=123456, sixteen_bit_tokens="prefill, <= 128"
        )
    ]
    console = Console(width=80, record=True, file=StringIO())
    console.print(table.to_table([row, *wide], "title"))
    said = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in said
    figures = (f"{row.kl_p99:.1e}", f"{row.kl_max:.1e}", f"{row.top1:.1%}", f"{row.overlap:.2%}")
    for figure in ("int8_exact", "prefill,", *figures):
        assert figure in said
