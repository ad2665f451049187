"""The documentation site: it builds without a warning and without network, loads nothing from
elsewhere, and its reference has every public name, with what a caller must know.
"""

import inspect
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
_NAMED = re.compile(
    r"^::: ([\w.]+)$(?:\n    options:(?:\n      (?!members).*)*\n      members: \[(.*)\])?",
    re.MULTILINE,
)
"""A line of the reference, and the members that it is restricted to."""
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
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(made)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
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
    told = [find(name) for path in REFERENCE for name, _ in _NAMED.findall(path.read_text())]
    public = {name: getattr(quantpage, name) for name in quantpage.__all__ if name[0] != "_"}
    public |= {name: each for name, each in vars(errors).items() if isinstance(each, type)}
    missing = [name for name, each in public.items() if not any(each is one for one in told)]
    assert missing == [], "docs/reference has a line '::: quantpage.NAME' for each"


def test_the_reference_says_what_a_caller_must_know():
    """Every function, and every method of a class: what it is, the type of all that goes in and
    comes out, the shape of tensors, and what it raises itself.
    """
    lacking = {
        where: missing
        for path in REFERENCE
        for name, members in _NAMED.findall(path.read_text())
        for where, function, said in documented(name, members)
        if (missing := list(gaps(function, said)))
    }
    assert lacking == {}


def documented(name, members):
    """(where, function, what is said of it) of a line of the reference."""
    found = find(name)
    if not isinstance(found, type):
        if inspect.isroutine(found):
            yield name, inspect.unwrap(found), found.__doc__ or ""
        return
    own = re.findall(r"\w+", members) if members else vars(found)
    for member in own:
        function = inspect.getattr_static(found, member)
        function = getattr(function, "fget", getattr(function, "__func__", function))
        # Shapes are checked around every function of a test run (tests/shapes.py).
        function = inspect.unwrap(function) if callable(function) else function
        # A dataclass's own __init__ was not written by anybody: its fields say what they are.
        if not inspect.isfunction(function) or function.__code__.co_filename[0] == "<":
            continue
        where = f"{name}.{member}"
        if member in ("__init__", "__post_init__", "__call__"):
            yield where, function, f"{found.__doc__ or ''} {function.__doc__ or ''}"
        elif not member.startswith("_"):
            yield where, function, function.__doc__ or ""


def gaps(function, said):
    """What is missing of a function of which ``said`` is all that is said."""
    if not said.strip():
        yield "a docstring"
    signature = inspect.signature(function)
    types = {each.name: each.annotation for each in signature.parameters.values()}
    types["what it returns"] = signature.return_annotation
    types.pop("self", None)
    types.pop("cls", None)
    for name, kind in types.items():
        if kind is inspect.Parameter.empty:
            yield f"the type of {name}"
        elif "Tensor" in re.sub(r"\w+\[Tensor, [^\]]*\]", "", shown(kind)) and "[" not in said:
            yield f"the shape of {name}"
    raised = re.findall(r"^\s+raise (\w+)\(", inspect.getsource(function), re.MULTILINE)
    yield from (each for each in sorted(set(raised)) if each not in said)


def shown(kind):
    """A type in words, jaxtyping's with their shapes."""
    return re.sub(r"\b(?:jaxtyping|torch)\.", "", kind if isinstance(kind, str) else str(kind))


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
