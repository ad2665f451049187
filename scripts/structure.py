"""Fill docs/modules.md's list of modules from their docstrings: a sentence a module.

python scripts/structure.py           rewrite the list
python scripts/structure.py --check   exit 1 where it is out of date
"""

import ast
import sys
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


def listed() -> str:
    """A section a folder, a line a module."""
    source = ROOT / "src" / "quantpage"
    lines = []
    for folder in sorted({path.parent for path in source.rglob("*.py")}):
        name = str(folder.relative_to(source.parent)).replace("\\", "/")
        own = sentence(folder / "__init__.py") if (folder / "__init__.py").exists() else ""
        lines += ["", f"## {name}", ""]
        if own:
            lines += [own, ""]
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"- `{path.stem}`: {sentence(path)}")
    return "\n".join(lines) + "\n\n"


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
