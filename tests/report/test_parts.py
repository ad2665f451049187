"""Finished parts: kept, found, and never taken for others."""

import json

import pytest

from quantpage.report.parts import Parts

pytestmark = pytest.mark.pure


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path / "r.parts", {"model": "a", "dtype": "float32"})


def test_what_was_measured_is_not_measured_again(parts):
    calls = []

    def make():
        calls.append(1)
        return {"kl": (1.5, 2.0)}

    first = parts.measure(make, "text", format="int8", window="w")
    assert parts.measure(make, "text", format="int8", window="w") == first == {"kl": [1.5, 2.0]}
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "answer"}, {"format": "int4"}, {"window": "v"}, {"page_size": 16},
    ],
)  # fmt: skip
def test_another_part_is_another(parts, other):
    about = {"kind": "text", "format": "int8", "window": "w", "page_size": 64}
    parts.keep([1], **about)
    assert parts.find(**about) == [1]
    assert parts.find(**(about | other)) is None


def test_another_model_finds_nothing(parts):
    parts.keep([1], "text", format="int8")
    assert (
        Parts(parts.folder, {"model": "b", "dtype": "float32"}).find("text", format="int8") is None
    )


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"key": {}, "found": [2]}', "[" * 100_000]
)
def test_a_damaged_part_is_measured_again(parts, damage):
    parts.keep([1], "text", format="int8")
    (file,) = parts.folder.iterdir()
    file.write_text(damage)
    assert parts.find("text", format="int8") is None
    assert parts.measure(lambda: [3], "text", format="int8") == [3]
    assert json.loads(file.read_text())["found"] == [3]


def test_an_interruption_keeps_what_was_finished(parts):
    def stop():
        raise KeyboardInterrupt

    parts.measure(lambda: 1, "text", format="int8")
    with pytest.raises(KeyboardInterrupt):
        parts.measure(stop, "text", format="int4")
    assert parts.find("text", format="int8") == 1 and parts.find("text", format="int4") is None
    assert len(list(parts.folder.iterdir())) == 1
