"""The default text: R's serialized character vectors, and a machine without Debian's tools."""

import struct
import zlib

import pytest

from quantpage.evaluate import text

pytestmark = pytest.mark.pure


def chunk(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + zlib.compress(body)


def vector(lines: list[str | None], version: int = 3, kind: int = 16) -> bytes:
    """What R writes for a character vector; None is a missing value."""
    out = b"X\n" + struct.pack(">iii", version, 0x040101, 0x030500)
    if version == 3:
        out += struct.pack(">i", 5) + b"UTF-8"
    out += struct.pack(">ii", kind, len(lines))
    for line in lines:
        raw = b"" if line is None else line.encode()
        out += struct.pack(">ii", 9 | 64 << 12, -1 if line is None else len(raw)) + raw
    return out


@pytest.mark.parametrize("version", [2, 3])
def test_vectors_are_read_and_other_chunks_are_passed_over(version):
    first, second = ["EMMA", "", "by Jane Austen", "naïve — ok"], ["PERSUASION", None]
    data = chunk(vector(first, version)) + chunk(vector(["a"], version, kind=13))
    data += b"\x00\x00\x00" + chunk(vector(second, version))
    assert list(text.read_novels(data)) == [first, ["PERSUASION", ""]]


def test_a_truncated_or_wrong_chunk_is_damaged():
    data = chunk(vector(["some lines", "of a book"]))
    with pytest.raises(ValueError, match="a damaged chunk at byte 0"):
        list(text.read_novels(data[:-3]))
    with pytest.raises(ValueError, match="a damaged chunk at byte 0"):
        list(text.read_novels(b"\x00\x00\x00\x01" + data[4:]))


def test_line_breaks_are_undone():
    novels = [["TITLE", "", "One line", "and  more.", "", "", "Next."], ["Second", "book"]]
    assert text.unwrap(novels) == "TITLE\n\nOne line and  more.\n\nNext.\n\nSecond book"


def test_a_file_that_exists_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "austen.txt"
    path.write_text("mine")
    assert text.obtain(path) == path
    assert path.read_text() == "mine"


def test_without_debian_one_sentence_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "new" / "austen.txt"
    assert text.main(["--to", str(path)]) == 2
    message = capsys.readouterr().err
    assert "no apt-get and no dpkg-deb" in message and "--text FILE" in message
    assert not path.parent.exists()


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("apt-get", "dpkg-deb"):
        (tools / name).write_text("#!/bin/sh\necho no such package >&2\nexit 100\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    with pytest.raises(OSError, match=r"exit code 100\): no such package"):
        text.obtain(tmp_path / "data" / "austen.txt")
    assert list((tmp_path / "data").iterdir()) == []
