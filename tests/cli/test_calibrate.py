"""`quantpage calibrate`: what it refuses, what it leaves alone, and one that was interrupted."""

import pytest
import torch
from safetensors.torch import load_file

from quantpage.integrations.hf_transformers.keys.calibration import Calibration
from quantpage.integrations.hf_transformers.keys.measured import Measured

pytestmark = pytest.mark.cpu


def test_a_calibration_replaces_nothing_but_a_calibration(quantpage, folder, words, tmp_path):
    out, weights = tmp_path / "made", folder / "model.safetensors"
    asked = ["calibrate", "--model", folder, "--text", words, "--tokens", 256, "--window", 128]
    for _ in range(2):
        assert "written" in quantpage(*asked, "--out", out).err
    for other in (words, weights, folder / "config.json"):
        before = other.read_bytes()
        said = quantpage(*asked, "--out", other, code=2).err
        assert "out: expected a new file or a quantpage calibration to replace, got " in said
        assert "loading" not in said and other.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtype", "foo"], "dtype: expected one of auto, float32, bfloat16, float16; got 'foo'"),
        (["--dtype", "int8"], "dtype: expected one of auto, float32"),
        (["--window", 1025], "window: expected at most the model's 1,024 positions, got 1,025"),
    ],
)
def test_what_calibrate_refuses_before_it_loads(quantpage, folder, words, tmp_path, flags, said):
    asked = ["calibrate", "--model", folder, "--text", words, "--out", tmp_path / "made", *flags]
    err = quantpage(*asked, code=2).err
    assert said in err and "loading" not in err and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("flags", "windows"),
    [
        (["--tokens", 300], "1 windows of 300 tokens"),
        (["--tokens", 1100], "1 windows of 1,024 tokens"),
        (["--tokens", 600, "--context", 256], "2 windows of 256 tokens"),
        (["--tokens", 600, "--window", 200], "3 windows of 200 tokens"),
    ],
)
def test_windows_are_as_long_as_there_is_room_for(
    quantpage, folder, words, tmp_path, flags, windows
):
    """Of the text, of the context, and of the model, which has 1,024 positions."""
    asked = ["calibrate", "--model", folder, "--text", words, "--out", tmp_path / "made"]
    assert f"measuring {windows}" in quantpage(*asked, "--no-feedback", *flags).err


def test_a_calibration_without_maps_is_not_taken_for_one(quantpage, folder, words, tmp_path):
    """Of static scales alone: formats that take maps would be measured without, under its name."""
    out = tmp_path / "made"
    asked = ["calibrate", "--model", folder, "--text", words, "--tokens", 256, "--window", 128]
    quantpage(*asked, "--out", out, "--kv-format", "int4_static")
    asked = ["evaluate", "--model", folder, "--text", words, "--windows", 1, "--prompt", 64]
    asked += ["--scored", 32, "--calibration", out, "--formats"]
    for name, layers in (("int8", "0, 1, 2"), ("int4_static,layers=1:int4", "1")):
        err = quantpage(*asked, name, code=2).err
        assert f"in layers {layers}, got none, as it was made for int4_static" in err
        assert "loading" not in err
    quantpage(*asked, "none,int4_static,k=int4_static,v=int8", code=2)
    quantpage(*asked, "none,int4_static")


@pytest.fixture
def calibrate(quantpage, folder, words):
    def call(out, *flags, code=0):
        asked = ["calibrate", "--model", folder, "--text", words, "--out", out]
        return quantpage(*asked, "--tokens", 768, "--window", 128, *flags, code=code).err

    return call


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C right after so many windows are kept; every one of them is."""
    monkeypatch.setattr("quantpage.integrations.hf_transformers.keys.measured.SECONDS", 0.0)
    save = Measured.save

    def after(count):
        def saved(measured, path, mark):
            save(measured, path, mark)
            if measured.texts == count:
                raise KeyboardInterrupt

        monkeypatch.setattr(Measured, "save", saved)

    return after


def test_without_feedback_a_file_has_maps_alone(calibrate, tmp_path):
    for flags, metric in (((), True), (("--no-feedback",), False)):
        calibrate(tmp_path / "made", *flags)
        found = load_file(tmp_path / "made")
        assert any(each.endswith(".scale") for each in found)
        assert any(each.endswith(".metric") for each in found) == metric


def test_a_file_says_for_which_context_it_is(calibrate, tmp_path):
    """No longer one than the model has positions, and no shorter one than is read."""
    maps = []
    for flags, wanted in (((), 1024), (("--context", 256), 256), (("--context", 128), 128)):
        calibrate(tmp_path / "made", *flags)
        found = Calibration.load(tmp_path / "made")
        assert found.note["context"] == wanted
        maps.append(found.layers[0].key_map.mean)
    assert not any(torch.equal(maps[0], other) for other in maps[1:])


@pytest.mark.parametrize("name", ["int4", "int8_static", "k=int8_static,v=int4"])
def test_an_interrupted_calibration_goes_on(calibrate, interrupt, tmp_path, name):
    whole, out, part = tmp_path / "whole", tmp_path / "made", tmp_path / "made.part"
    calibrate(whole, "--kv-format", name)
    for count, before in ((2, None), (5, 2)):
        interrupt(count)
        said = calibrate(out, "--kv-format", name, code=130)
        assert ("measured before" in said) == (before is not None)
        assert part.exists() and not out.exists()
    interrupt(None)
    assert "5 of them were measured before" in calibrate(out, "--kv-format", name)
    one, other = load_file(whole), load_file(out)
    assert one.keys() == other.keys()
    assert all(one[each].equal(other[each]) for each in one)
    assert not part.exists()


@pytest.mark.parametrize(
    "flags",
    [("--dtype", "float32"), ("--window", 192), ("--kv-format", "fp8_static"), ("--context", 300)],
)
def test_what_another_calibration_measured_is_not_taken(calibrate, interrupt, tmp_path, flags):
    out = tmp_path / "made"
    interrupt(3)
    calibrate(out, "--dtype", "bfloat16", code=130)
    interrupt(None)
    assert "measured before" not in calibrate(out, *flags)


def test_a_file_in_the_place_of_what_is_measured_is_left_alone(calibrate, tmp_path):
    part = tmp_path / "made.part"
    part.write_text("mine")
    said = calibrate(tmp_path / "made", code=2)
    assert "out: expected a new file or a quantpage measurement to replace" in said
    assert part.read_text() == "mine"
