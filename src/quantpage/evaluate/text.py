"""The text of the accuracy table: Jane Austen's novels out of Debian's r-cran-janeaustenr.

    python -m quantpage.evaluate.text --to austen.txt

927 thousand tokens of public-domain prose in a package of 1.6 MB (code MIT). The package is only
downloaded and unpacked, nothing is installed and R is not needed: data/Rdata.rdb is a run of
chunks (length as big-endian u32, zlib), each an R character vector in XDR, one string a line of
the book. Hard line breaks are undone: a paragraph a line, an empty line between.
"""

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from quantpage import console

PACKAGE = "r-cran-janeaustenr"
_MEMBER = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_CHARACTER_VECTOR = 16


def default_path() -> Path:
    """Where the novels are kept: the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "quantpage" / "austen.txt"


def read(path: Path) -> str:
    """The text of a file; ValueError where it is no text in UTF-8, or none at all."""
    if not path.is_file():
        raise FileNotFoundError(f"text: expected a text file, got {path}")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text: expected a text in UTF-8, got {path} ({error})") from error
    if "\0" in text or not text.strip():
        what = "NUL bytes" if text.strip() else "nothing in it"
        raise ValueError(f"text: expected a text in UTF-8, got {path} with {what}")
    return text


def obtain(path: Path) -> Path:
    """Make ``path`` hold the novels; does nothing when it exists.

    Raises OSError where there is no Debian, and says what to do instead.
    """
    if path.is_file():
        return path
    console.note(f"fetching Jane Austen's novels from Debian to {path}")
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise OSError(
            f"text: the default text comes from the Debian package {PACKAGE}, and this machine "
            f"has no {' and no '.join(missing)}; give any English text with --text FILE"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".obtaining-") as name:
        work = Path(name)
        _run(["apt-get", "download", PACKAGE], work)
        for package in work.glob("*.deb"):
            _run(["dpkg-deb", "-x", package.name, "unpacked"], work)
        database = work / "unpacked" / _MEMBER
        if not database.is_file():
            raise OSError(f"text: expected {_MEMBER} in {PACKAGE}, found none; use --text FILE")
        made = work / "text"
        made.write_text(unwrap(list(read_novels(database.read_bytes()))), encoding="utf-8")
        made.replace(path)
    return path


def read_novels(database: bytes) -> Iterator[list[str]]:
    """Each character vector of an R lazy-load database: the lines of a book."""
    at = 0
    while at + 5 < len(database):
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(database[at + 4 :])
        except zlib.error:
            # Padding between chunks.
            at += 1
            continue
        (length,) = struct.unpack_from(">I", database, at)
        if not inflate.eof or len(data) != length:
            raise ValueError(f"text: a damaged chunk at byte {at} of the database")
        at = len(database) - len(inflate.unused_data)
        yield from _character_vector(data)


def unwrap(novels: list[list[str]]) -> str:
    """Lines of books as paragraphs."""
    text = "\n\n\n".join("\n".join(lines) for lines in novels)
    paragraphs = (re.sub(r"\s*\n\s*", " ", each).strip() for each in re.split(r"\n\s*\n", text))
    return "\n\n".join(each for each in paragraphs if each)


def _character_vector(data: bytes) -> Iterator[list[str]]:
    """The strings of one XDR chunk; nothing when it holds another type."""
    at = 2 if data[:2] == b"X\n" else 0
    (version,) = struct.unpack_from(">i", data, at)
    at += 12
    if version == 3:
        # The native encoding: its length, its name.
        at += 4 + struct.unpack_from(">i", data, at)[0]
    flags, count = struct.unpack_from(">ii", data, at)
    if flags & 255 != _CHARACTER_VECTOR:
        return
    at += 8
    lines = []
    for _ in range(count):
        # An element's flags and its length; -1 is R's missing value.
        length = max(struct.unpack_from(">ii", data, at)[1], 0)
        at += 8
        lines.append(data[at : at + length].decode("utf-8", "replace"))
        at += length
    yield lines


def _run(command: list[str], work: Path) -> None:
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(
            f"text: `{' '.join(command)}` failed (exit code {done.returncode}): "
            f"{done.stderr.strip() or 'no message'}. Run `apt-get update` first, or give any "
            "English text with --text FILE"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line; one line on stderr and exit code 2 when it fails."""
    parser = argparse.ArgumentParser(
        prog="python -m quantpage.evaluate.text",
        description=f"Obtain Jane Austen's novels as plain text from Debian's {PACKAGE}.",
    )
    parser.add_argument("--to", type=Path, required=True, help="file to make")
    chosen = parser.parse_args(arguments)
    try:
        path = obtain(chosen.to)
    except OSError as error:
        print(f"quantpage: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
