"""A whole report on a tiny model, from the command to its files, and how it may end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from quantpage.cli.app import run
from quantpage.report import ReportRequest, load
from quantpage.report import predictions as asked
from tests.integrations.tiny_models import save_tiny
from tests.report.reader import Reader

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose tokens are words, and a text of them."""
    path = save_tiny(tmp_path_factory.mktemp("model"))
    drawn = torch.Generator().manual_seed(3)
    words = torch.randint(3, 128, (1400,), generator=drawn).tolist()
    (path / "words.txt").write_text(" ".join(f"w{i}" for i in words))
    return path


def given(folder, out, *more):
    """The command, small."""
    return [
        "report", "--model", str(folder), "--text", str(folder / "words.txt"), "--out", str(out),
        "--formats", "none,int8,int4,first1=int8", "--scored", "60", "--windows", "1",
        "--answers", "2", "--steps", "6", "--needles", "100", "--context", "512",
        "--page-size", "16", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """The folder of a finished report."""
    out = tmp_path_factory.mktemp("out") / "new" / "page.html"
    assert run(given(folder, out)) == 0
    return out.parent


def test_the_files_stand_beside_each_other_and_agree(made):
    names = {each.name for each in made.iterdir()}
    pictures = {"page-error.png", "page-position.png", "page-heads.png"}
    assert names == {"page.html", "page.json", "page.parts"} | pictures
    assert all((made / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    data = load(made / "page.json")
    assert json.loads(Reader((made / "page.html").read_text()).texts["data"]) == data
    assert list(made.rglob("*.part")) == []


def test_its_figures_make_sense(made):
    data = load(made / "page.json")
    rows = {row["format"]: row for row in data["fidelity"]["rows"]}
    assert list(rows) == ["none", "int8", "int4,first1=int8"]
    assert rows["none"]["kl_mean"] < 1e-9 < rows["int8"]["kl_mean"]
    assert rows["int8"]["kl_mean"] <= rows["int8"]["kl_p99"] <= rows["int8"]["kl_max"]
    assert rows["int8"]["overlap"] < rows["none"]["overlap"] == pytest.approx(1, abs=1e-4)
    assert data["fidelity"]["yardstick"]["kl_mean"] > 1e-6
    position, answers = data["position"], data["answers"]
    assert position["edges"][0] == 64 and position["edges"][-1] == 124
    # Stretches are as long as each other, so that their mean is the format's.
    mean = sum(position["kl"]["int8"]) / len(position["kl"]["int8"])
    assert mean == pytest.approx(rows["int8"]["kl_mean"], rel=1e-3)
    assert answers["until"]["none"] == [6, 6]
    found = data["needle"]["found"]
    assert found["none"] == found["unquantized"] and len(found["int8"]) == 3
    errors = data["heads"]["errors"]
    assert set(errors) == {"int8", "int4,first1=int8"}
    # The first layer is int8 in both.
    assert errors["int4,first1=int8"]["keys"]["0"] == errors["int8"]["keys"]["0"]
    assert errors["int4,first1=int8"]["keys"]["1"] != errors["int8"]["keys"]["1"]
    assert len(data["heads"]["pictures"]["heads"]) == 3 * 2
    curve = data["advice"]["curve"]
    assert [each["bits"] for each in curve] == sorted(each["bits"] for each in curve)
    assert data["memory"]["rows"][1]["bytes_per_token"] == 3 * 2 * 2 * (16 + 2)
    assert data["served"]["choices"] and data["made"]["text"] == "words.txt"


def test_a_second_report_measures_only_what_is_new(folder, made, monkeypatch):
    before = load(made / "page.json")
    passes = []
    forward = asked.log_probabilities

    def counted(model, window, *rest):
        passes.append(window.tokens.shape[1])
        return forward(model, window, *rest)

    monkeypatch.setattr(asked, "log_probabilities", counted)
    again = given(folder, made / "page.html")
    assert run(again) == 0 and passes == []
    after = load(made / "page.json")
    for each in (before, after):
        # When, how much memory was free: of this run.
        del each["made"]["date"], each["memory"]
    assert after == before
    again[again.index("--formats") + 1] += ",fp8"
    assert run(again) == 0
    # One window, two answers, three needles: the unquantized ones again beside fp8's.
    assert len(passes) == 2 + 2 * 2 + 3
    rows = load(made / "page.json")["fidelity"]["rows"]
    assert [row["format"] for row in rows][-1] == "fp8"


def test_what_the_command_says(folder, made, capsys):
    assert run(given(folder, made / "page.html")) == 0
    said = capsys.readouterr()
    verdict = load(made / "page.json")["verdict"]
    assert said.out.splitlines()[0] == verdict["headline"]
    assert verdict["flag"] in said.out and "written: " in said.err
    assert run(given(folder, made / "page.html", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict


def test_two_reports_are_compared(made, capsys, tmp_path):
    data = str(made / "page.json")
    assert run(["compare", data, data, "--out", str(tmp_path / "both.html")]) == 0
    assert "say both" in capsys.readouterr().out
    assert "Nothing that the figures depend on" in (tmp_path / "both.html").read_text()
    assert run(["compare", data, data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_predictions"]
    assert run(["compare", data, str(made / "page.html")]) == 2
    assert "expected JSON of `quantpage report`" in capsys.readouterr().err
    assert run(["compare", data, str(made / "none.json")]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--formats", "int9"], "expected one of"),
        (["--formats", "fp8_static"], "static scales for fp8_static"),
        (["--text", "none.txt"], "text: expected a text file"),
        (["--needles", "x"], "needles: expected lengths such as 256,512"),
        (["--needles", "12"], "needle lengths: expected more than"),
        (["--windows", "9", "--scored", "900"], "text: expected at least"),
        (["--dtype", "int8"], "dtype: expected one of"),
        (["--device", "tpu"], "device: expected auto"),
        (["--page-size", "17"], "page_size: expected one of"),
        (["--model", "nothing"], "model: expected"),
    ],
)
def test_wrong_arguments_end_in_a_sentence_and_write_nothing(
    folder, tmp_path, capsys, changes, words
):
    assert run(given(folder, tmp_path / "page.html", *changes)) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_said_first(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("quantpage.report.gather.load_model", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "a.parts").write_text("")
    (tmp_path / "b.json").mkdir()
    for name in (".", "file/page.html", "a.html", "b.html"):
        assert run(given(folder, tmp_path / name)) == 2
        assert "out: expected" in capsys.readouterr().err


def test_requests_are_checked():
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        ReportRequest("m", Path("r.html"), steps=0)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interruption_keeps_finished_parts_and_writes_no_page(folder, tmp_path):
    out = tmp_path / "page.html"
    # So many steps that it is not done before it is interrupted.
    command = [sys.executable, "-m", "quantpage", *given(folder, out, "--steps", "200")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while time.monotonic() < end and not list(tmp_path.glob("page.parts/text-*.json")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and said.rstrip().endswith("quantpage: interrupted")
    assert {each.name for each in tmp_path.iterdir()} == {"page.parts"}
    kept = {each.name for each in (tmp_path / "page.parts").iterdir()}
    assert run(given(folder, out)) == 0
    assert kept <= {each.name for each in (tmp_path / "page.parts").iterdir()} and out.is_file()
