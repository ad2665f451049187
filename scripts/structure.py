"""Fill docs/modules.md's list from docstrings: a sentence a module of the package, and a script.

python scripts/structure.py           rewrite the list
python scripts/structure.py --check   exit 1 where it is out of date
"""

import ast
import sys
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "modules.md"
START, END = "<!-- modules: scripts/structure.py -->", "<!-- end of modules -->"


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    text = " ".join(first.split())
    end = text.find(". ")
    return (text if end < 0 else text[: end + 1]).removesuffix(".")


def said(script: Path) -> str:
    """The same of a script; of one in bash it stands in the comment below its first line."""
    if script.suffix == ".py":
        return sentence(script)
    below = script.read_text().split("\n")[1:]
    text = " ".join(line[2:] for line in takewhile(lambda line: line.startswith("# "), below))
    return text.split(". ")[0].split(" usage: ")[0].removesuffix(".")


def scripts() -> list[str]:
    """A line a script, then a line a room of them."""
    found = sorted(path for path in (ROOT / "scripts").iterdir() if path.suffix in (".py", ".sh"))
    rooms = sorted(path.parent for path in (ROOT / "scripts").glob("*/__init__.py"))
    lines = [
        "",
        "## scripts",
        "",
        "What people run; the first lines of each say how",
        "",
    ]
    lines += [f"- `{path.name}`: {said(path)}" for path in found]
    return lines + [f"- `{room.name}/`: {sentence(room / '__init__.py')}" for room in rooms]


def listed() -> str:
    """A section a folder, a line a module."""
    source = ROOT / "src" / "quantpage"
    lines: list[str] = []
    for folder in sorted({path.parent for path in source.rglob("*.py")}):
        name = str(folder.relative_to(source.parent)).replace("\\", "/")
        own = sentence(folder / "__init__.py") if (folder / "__init__.py").exists() else ""
        lines += ["", f"## {name}", ""]
        if own:
            lines += [own, ""]
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"- `{path.stem}`: {sentence(path)}")
    return "\n".join(lines + scripts()) + "\n\n"


def filled(page: str) -> str:
    """``page`` with the list as it should be."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{listed()}{END}{after}"


def main() -> int:
    """Rewrite or check; the exit status."""
    page = PAGE.read_text()
    wanted = filled(page)
    if "--check" in sys.argv[1:]:
        if page != wanted:
            print(f"{PAGE.name}: the list of modules is out of date; run scripts/structure.py")
            return 1
        return 0
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
