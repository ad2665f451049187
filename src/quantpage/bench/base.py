"""A bench of this tree beside the same bench of another commit: `quantpage bench X --base COMMIT`.

Both trees take turns in processes of their own, so that a machine that slows down slows both. A row
has the median of its turns: before, after, and their ratio, below 1 where this tree is faster.
"""

import csv
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import quantpage
from quantpage import console
from quantpage.bench.rows import RowPrinter, current_commit, write_table
from quantpage.cpu_core import find_core
from quantpage.errors import Unavailable

TURNS = 3
_KERNEL = ("case", "new", "head_dim", "q_heads", "page_size", "implementation", "format")
TIMED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "decode": (_KERNEL, ("microseconds",)),
    "latent": (_KERNEL, ("microseconds",)),
    "write": (_KERNEL, ("microseconds",)),
    "prefill": (("case", "implementation", "format"), ("microseconds",)),
    "masks": (("kind", "tokens", "new", "implementation", "part"), ("microseconds",)),
    "gpu_model": (("kv_format", "batch", "context"), ("decode_ms",)),
    "cpu": (("case", "what", "threads"), ("microseconds",)),
    "cpu_model": (
        ("context", "cache", "weights", "threads"),
        ("decode_ms_median", "prompt_ms_median"),
    ),
    "bookkeeping": (("case",), ("microseconds_each",)),
}
"""Of each bench: the columns that say what was timed, and the time, by whichever name it has."""

SENTENCES: dict[int, type[Exception]] = {2: ValueError, 3: Unavailable}
"""Exit codes of commands that say in a sentence what was wrong (docs/commands.md)."""

# An installation in place redirects imports to its own tree: its finder is taken out first.
_CHILD = """
import sys
from pathlib import Path
tree, *words = sys.argv[1:]
sys.meta_path = [f for f in sys.meta_path if "_editable" not in type(f).__module__]
sys.path.insert(0, tree)
import quantpage
assert Path(quantpage.__file__).is_relative_to(tree), quantpage.__file__
from quantpage.cli.app import run
sys.exit(run(["bench", *words]))
"""


def compare(command: str, given: Mapping[str, Any], out: Path | None, base: str) -> None:
    """Time a function of cli/bench in both trees, print the rows, and write them to ``out``.

    given: its arguments, without ``out`` and those of no weight. base: see ``make_tree``. Raises
    what that and ``run_tree`` raise.
    """
    with tempfile.TemporaryDirectory(prefix="quantpage-base-") as folder:
        trees = {"before": make_tree(base, Path(folder)), "after": _package().parent}
        made: dict[str, list[list[dict[str, str]]]] = {name: [] for name in trees}
        for turn in range(TURNS):
            # Who goes first takes turns, too.
            for name in sorted(trees, reverse=turn % 2 == 0):
                console.ERR.print(f"turn {turn + 1} of {TURNS}: {name}")
                path = Path(folder) / f"{name}.csv"
                made[name].append(run_tree(trees[name], command, given, path))
    rows = joined(command, made["before"], made["after"])
    about = {"base": base, "commit": given.get("commit") or current_commit() or "-"}
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    show = RowPrinter(**widths)
    for row in rows:
        show(row)
    if out is not None:
        write_table([row | about for row in rows], out)


def make_tree(base: str, folder: Path) -> Path:
    """The package as it was, in ``folder``, with a core that fits it; what to put on the path.

    base: a commit of the checkout that this package stands in, or another checkout's folder, for
    machines that have no history. Raises ValueError where it is neither, and RuntimeError where its
    core cannot be compiled.
    """
    tree = folder / "tree"
    root = copy_checkout(Path(base), tree) if Path(base).is_dir() else unpack(base, tree)
    if find_core() is None:
        # Without a core here there is nothing to compare with one.
        return tree / "src"
    if _core_sources(tree) == _core_sources(root):
        # From the same sources: compiling again would give the same core.
        for path in map(Path, quantpage.__path__):
            for library in path.rglob("*.so"):
                shutil.copy(library, tree / "src/quantpage" / library.relative_to(path))
        return tree / "src"
    built = folder / "installed"
    console.ERR.print(f"compiling the core of {base}")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*install, str(built), str(tree)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"base {base}: it cannot be installed:\n{_end(done.stderr)}")
    return built


def copy_checkout(source: Path, tree: Path) -> Path:
    """What a package is made of, from ``source`` to ``tree``; this package's own checkout."""
    if not (source / "src/quantpage/__init__.py").is_file():
        raise ValueError(f"base: expected a folder with src/quantpage in it, got {source}")
    tree.mkdir()
    for part in source.iterdir():
        if part.is_file():
            shutil.copy(part, tree)
    for name in ("src", "csrc"):
        compiled = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(source / name, tree / name, ignore=compiled)
    return _package().parent.parent


def unpack(commit: str, tree: Path) -> Path:
    """The files of a commit in ``tree``; the checkout that it is a commit of."""
    git = ["git", "-C", str(_package())]
    top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    root = Path(top.stdout.strip())
    given = ["git", "-C", str(root), "archive", "--format=tar", commit]
    archive = None if top.returncode else subprocess.run(given, capture_output=True)
    if archive is None or archive.returncode:
        raise ValueError(
            "base: expected a commit of the checkout that quantpage stands in, or the folder of "
            f"another checkout; got {commit!r}"
        )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as packed:
        packed.extractall(tree, filter="data")
    return root


def _core_sources(root: Path) -> dict[str, bytes]:
    files = [root / "CMakeLists.txt", *(root / "csrc").glob("*")]
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def _package() -> Path:
    return Path(quantpage.__file__).parent


def run_tree(
    tree: Path, command: str, given: Mapping[str, Any], path: Path
) -> list[dict[str, str]]:
    """The rows of one bench, run in a process of its own, by the command's own flags.

    Raises ValueError and Unavailable with the sentence of a command that ended so: an older tree
    may not have a flag. RuntimeError has the last words of any other end.
    """
    words = [command.replace("_", "-"), f"--out={path}", *map(_flag, given, given.values())]
    started = [sys.executable, "-c", _CHILD, str(tree), *words]
    done = subprocess.run(started, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.rpartition("quantpage: ")[2].strip()
        where = f"bench {words[0]} of {'this tree' if tree == _package().parent else 'the base'}"
        if done.returncode in SENTENCES:
            raise SENTENCES[done.returncode](f"{where}: {said}")
        raise RuntimeError(f"{where}: it ended with\n{_end(done.stderr)}")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _flag(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


def joined(
    command: str,
    before: Sequence[Sequence[Mapping[str, str]]],
    after: Sequence[Sequence[Mapping[str, str]]],
) -> list[dict[str, str]]:
    """A row of each thing that either has timed; '-' where only the other has."""
    keys, columns = TIMED[command]
    made = [row for turns in (*before, *after) for row in turns]
    time = next((each for each in columns if any(row.get(each) for row in made)), columns[0])
    found: dict[tuple[str, ...], tuple[list[float], list[float]]] = {}
    for side, turns in enumerate((before, after)):
        for row in (row for rows in turns for row in rows):
            known = row.get(time, "")
            times = found.setdefault(tuple(row[key] for key in keys), ([], []))[side]
            # A check that failed has a word where others have a time.
            times += [float(known)] if known.replace(".", "", 1).isdecimal() else []
    rows = []
    for key, sides in found.items():
        old, new = (statistics.median(times) if times else None for times in sides)
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "time": time,
                "before": "-" if old is None else f"{old:.4g}",
                "after": "-" if new is None else f"{new:.4g}",
                "ratio": f"{new / old:.3f}" if old and new is not None else "-",
                "turns": str(min(len(times) for times in sides)),
            }
        )
    return rows


def _end(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-6:])
