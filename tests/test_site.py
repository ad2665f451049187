"""The documentation site: it builds without a warning and without network, loads nothing from
elsewhere, and its reference has every public name, with what a caller must know.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import quantpage
from quantpage import errors

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parent.parent
REFERENCE = sorted(ROOT.glob("docs/reference/*.md"))
_ELSEWHERE = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?(?:https?:)?//[^">]*')
_NAMED = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
_NO_NETWORK = """
import socket
def refuse(*_, **__):
    raise OSError("a page wanted the network")
socket.socket.connect = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site needs pip install -r requirements-docs.txt")
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(_NO_NETWORK)
    made = folder / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(made)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return made


def test_it_builds_with_every_page_in_the_navigation_and_no_dead_link(site):
    pages = {
        path.relative_to(ROOT / "docs").with_suffix(".html") for path in ROOT.glob("docs/**/*.md")
    }
    assert pages <= {path.relative_to(site) for path in site.glob("**/*.html")}
    # What pages link to outside of docs/ travels with them.
    assert (site / "files/benchmarks/results/accuracy-smollm2.csv").is_file()


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.glob("**/*.html"):
        assert _ELSEWHERE.findall(path.read_text()) == [], path
    for path in site.glob("**/*.css"):
        assert re.findall(r"(?:@import|url\()[^;)]*//[^;)]*", path.read_text()) == [], path


def test_every_public_name_is_in_the_reference():
    told = [find(name) for path in REFERENCE for name in _NAMED.findall(path.read_text())]
    public = {name: getattr(quantpage, name) for name in quantpage.__all__ if name[0] != "_"}
    public |= {name: each for name, each in vars(errors).items() if isinstance(each, type)}
    missing = [name for name, each in public.items() if not any(each is one for one in told)]
    assert missing == [], "docs/reference has a line '::: quantpage.NAME' for each"


def find(path):
    """What a line of the reference names."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part)
        except (ModuleNotFoundError, AttributeError):
            continue
        return found
    raise AssertionError(f"{path}: there is no such name")
