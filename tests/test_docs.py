"""The Python blocks of README.md and of the pages in docs/ run, print what is printed below them,
and links lead somewhere.

    ```python            runs; blocks of a file share their names, from the top down
    ```python fragment   does not run: a piece of a file, or something that needs a GPU
    ```text              directly after a block that runs: exactly what it prints
"""

import re
from contextlib import redirect_stdout
from dataclasses import MISSING, dataclass, fields
from io import StringIO
from pathlib import Path

import pytest

from quantpage.cpu_core import absence
from quantpage.explain import support_matrix
from quantpage.ops.dispatch import Implementation

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
MODEL = "models/smollm2"
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TOKENS = re.compile(r"max_new_tokens=\d+")
_TESTS = re.compile(r"(?<![\w$/])tests/[\w/.-]+")
"""A path of tests, as pages and scripts name it; up to a star, where it is a pattern."""
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)[^)]*\)")


@dataclass
class Block:
    line: int
    code: str
    prints: str | None
    """What the block below it says; None: there is none."""


def blocks_of(text: str) -> list[Block]:
    """The blocks that run."""
    found: list[Block] = []
    end = -1
    for match in _FENCE.finditer(text):
        kind, body = match.groups()
        if kind == "python":
            found.append(Block(text[: match.start()].count("\n") + 2, body, None))
            end = match.end()
        elif kind == "text" and end >= 0 and not text[end : match.start()].strip():
            found[-1].prints = body
            end = -1
    return found


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_blocks_run_and_print_what_they_say(path, tmp_path, monkeypatch):
    blocks = blocks_of(path.read_text())
    # What a block writes goes to a folder of its own; the model is found where it always is.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    names: dict = {"__name__": "docs"}
    for block in blocks:
        if MODEL in block.code and not (ROOT / MODEL / "config.json").is_file():
            pytest.skip(f"{MODEL} is missing: scripts/demo.sh fetches it")
        said = StringIO()
        # Lines are counted from the top of the page, so that a traceback points into it.
        # A few tokens show that a block with the model works; all of them take minutes on a CPU.
        short = _TOKENS.sub("max_new_tokens=3", block.code)
        code = compile("\n" * (block.line - 1) + short, str(path), "exec")
        with redirect_stdout(said):
            exec(code, names)
        if block.prints is not None:
            assert said.getvalue() == block.prints, f"{named(path)}, line {block.line}"


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    missing = [to for to in _LINK.findall(path.read_text()) if not (path.parent / to).exists()]
    assert missing == []


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("scripts/*.sh"))], ids=named
)
def test_tests_are_where_they_are_said_to_be(path):
    said = {each.rstrip(".") for each in _TESTS.findall(path.read_text())}
    assert [each for each in said if not list(ROOT.glob(f"{each}*"))] == []


def test_a_decode_step_goes_through_these_files():
    """Every file that the page names is there, and has the functions that its drawings show."""
    text = (ROOT / "docs/decode-step.md").read_text()
    text = text.replace("hf/", "integrations/hf_transformers/")
    drawn = re.findall(r"─ (?:[A-Z]\w+\.)?(\w+) {2,}([\w/]+\.py)", text)
    assert len(drawn) > 20
    for name in re.findall(r"[\w/]+\.py", text):
        assert list((ROOT / "src/quantpage").glob(f"**/{name}")), name
    for function, name in drawn:
        found = [each.read_text() for each in (ROOT / "src/quantpage").glob(f"**/{name}")]
        assert any(re.search(rf"\b{function}\b", each) for each in found), f"{name}: {function}"


def test_all_that_an_implementation_can_say_of_itself_is_on_its_page():
    page = (ROOT / "docs/adding-an-implementation.md").read_text()
    table = page.partition("| field | means |")[2].partition("\n\n")[0]
    said = re.findall(r"^\| `(\w+)(?:=True)?` \|", table, re.MULTILINE)
    optional = [each.name for each in fields(Implementation) if each.default is not MISSING]
    assert sorted(said) == sorted(optional)


def test_the_support_matrix_is_what_dispatch_says():
    if absence():
        pytest.skip(absence())
    assert support_matrix() in (ROOT / "docs/support.md").read_text()


def test_what_runs_and_what_does_not():
    page = (
        "```python\na = 1\n```\n\n```text\nb\n```\n"
        "```python fragment\nc\n```\n```text\nd\n```\n```python\ne\n```\nwords\n```text\nf\n```\n"
    )
    assert [(block.line, block.code, block.prints) for block in blocks_of(page)] == [
        (2, "a = 1\n", "b\n"),
        (15, "e\n", None),
    ]
