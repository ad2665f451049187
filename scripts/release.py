"""Write a version into every file that has one, and date its part of the changelog.

    python scripts/release.py 0.2.0

scripts/release.sh calls it. Nothing is changed unless all of it can be.
"""

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = {
    "pyproject.toml": r'^version = "([^"]+)"$',
    "src/quantpage/__init__.py": r'^__version__ = "([^"]+)"$',
    "CITATION.cff": r"^version: (\S+)$",
}
"""File -> the line with the version."""
OPEN = r"^## (\S+) \(not released\)$"
_VERSION = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")


def versions(root: Path) -> dict[str, str]:
    """The version that each file has."""
    found = {}
    for name, pattern in PLACES.items():
        lines = re.findall(pattern, (root / name).read_text(), re.MULTILINE)
        if len(lines) != 1:
            raise ValueError(f"{name}: expected one line with the version, found {len(lines)}")
        found[name] = lines[0]
    return found


def release(root: Path, version: str, day: datetime.date) -> None:
    """Make ``root`` the release of ``version``; ValueError where it cannot be, nothing changed."""
    if not _VERSION.fullmatch(version):
        raise ValueError(f"version: expected a number such as 0.2.0 or 1.0.0rc1, got {version!r}")
    written = {}
    for name, old in versions(root).items():
        text = (root / name).read_text()
        line = re.search(PLACES[name], text, re.MULTILINE)
        assert line is not None and line[1] == old
        written[name] = text[: line.start(1)] + version + text[line.end(1) :]
    log = (root / "CHANGELOG.md").read_text()
    parts = list(re.finditer(OPEN, log, re.MULTILINE))
    if len(parts) != 1 or parts[0][1] != version:
        there = ", ".join(part[1] for part in parts) or "none"
        raise ValueError(
            f"CHANGELOG.md: expected '## {version} (not released)' and no other such heading, "
            f"got {there}"
        )
    rest = log[parts[0].end() :].partition("\n## ")[0]
    if not re.search(r"^- ", rest, re.MULTILINE):
        raise ValueError(f"CHANGELOG.md: expected entries below {version}, got none")
    heading = f"## {version} ({day.isoformat()})"
    written["CHANGELOG.md"] = log[: parts[0].start()] + heading + log[parts[0].end() :]
    for name, text in written.items():
        (root / name).write_text(text)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: scripts/release.py VERSION", file=sys.stderr)
        return 2
    try:
        release(ROOT, sys.argv[1], datetime.datetime.now(datetime.UTC).date())
    except ValueError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
