#!/usr/bin/env python
"""Defects on purpose, one at a time in a copy: the tests named beside each have to fail.

    python scripts/mutants.py                  all, by their tests; exit code 1 for a survivor
    python scripts/mutants.py --by fuzz        those that the fuzz has to find, by it alone
    python scripts/mutants.py window crop      of these words only

A mutation whose text does not stand in its file once is an error: the list stays true.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
# An installation in place redirects imports to the original: its finder is taken out first, also of
# processes that tests start.
START = """import sys
sys.meta_path = [f for f in sys.meta_path if "_editable" not in type(f).__module__]
sys.path[:0] = [{src!r}, {scripts!r}]
"""
PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
FUZZ = "import sys; sys.argv[0] = 'fuzz.py'; import fuzz; sys.exit(fuzz.main())"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="in the name; none: all")
    parser.add_argument("--by", choices=["tests", "fuzz"], default="tests")
    asked = parser.parse_args()
    chosen = [
        each
        for each in MUTATIONS
        if not asked.words or any(word in each.name for word in asked.words)
    ]
    if asked.by == "fuzz":
        chosen = [each for each in chosen if each.fuzz]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = make_copy(Path(folder))
        for each in chosen:
            began = time.perf_counter()
            dead = try_one(copy, each, asked.by)
            print(
                f"{'killed' if dead else 'SURVIVED':9}{time.perf_counter() - began:5.0f} s  "
                f"{each.name} ({each.file})",
                flush=True,
            )
            if not dead:
                survivors.append(each.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed")
    return int(bool(survivors))


def make_copy(folder: Path) -> Path:
    """What tests need, and the compiled core beside the package."""
    import quantpage

    for name in ("src", "tests", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    start = START.format(src=str(folder / "src"), scripts=str(folder / "scripts"))
    (folder / "sitecustomize.py").write_text(start)
    for installed in quantpage.__path__:
        for core in Path(installed).rglob("*.so"):
            target = folder / "src/quantpage" / core.relative_to(installed)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(core, target)
    return folder


def try_one(copy: Path, mutation: Mutation, by: str) -> bool:
    """True where it is found."""
    path = copy / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        sys.exit(
            f"{mutation.name}: expected the text once in {mutation.file}, "
            f"got it {text.count(mutation.old)} times: {mutation.old!r}"
        )
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        if by == "fuzz":
            done = run(copy, FUZZ, *mutation.fuzz.split())
            return done.returncode == 1 and "failed: --seed" in done.stdout
        done = run(copy, PYTEST, "-q", "-x", "-p", "no:cacheprovider", *mutation.tests)
        # 1: tests failed; a kernel that writes outside its memory may end whoever looks on.
        # Anything else is no verdict of theirs.
        if done.returncode not in (0, 1, *CRASHES):
            sys.exit(f"{mutation.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
        return done.returncode != 0
    finally:
        path.write_text(text)


def run(copy: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_INTERPRET": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
