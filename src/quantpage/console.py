"""What commands print beside their result: notes, progress and errors, all on stderr.

Results go to stdout and nothing else does, so that they can be piped. One style of table and of
progress bar for all commands; other libraries' bars and advice stay out of the way.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

OUT = Console(markup=False, highlight=False, emoji=False)
"""Results."""
ERR = Console(stderr=True, markup=False, highlight=False, emoji=False)
"""Everything else; silent during a command with --quiet."""


def quiet_libraries() -> None:
    """Other libraries draw no bars and give no advice."""
    # Read when transformers is imported: its advice is for its own users, not for ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loaded = sys.modules.get("transformers")
    if loaded is not None:
        loaded.utils.logging.set_verbosity_error()
        loaded.utils.logging.disable_progress_bar()
    if not sys.warnoptions:
        for each in ("torch", "transformers", "huggingface_hub", "accelerate", "gguf"):
            warnings.filterwarnings("ignore", module=each)


def note(message: str) -> None:
    """A line on stderr for the reader, not for a program."""
    ERR.print(message, soft_wrap=not ERR.is_terminal)


def print_line(text: str) -> None:
    """A line of a result: folded on a terminal, whole in a pipe, where a program may read it."""
    OUT.print(text, soft_wrap=not OUT.is_terminal)


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and what they are, a line each."""
    width = max(map(len, facts))
    for name, fact in facts.items():
        print_line(f"{name:{width}}  {fact}")


def print_json(data: object) -> None:
    """A result for a program."""
    print(json.dumps(data, indent=2))


@contextmanager
def status(message: str) -> Iterator[Any]:
    """What is being waited for: a spinner on a terminal, a line elsewhere.

    Yields an object whose ``stop()`` ends the spinner early.
    """
    spinner = ERR.status(message)
    if not ERR.is_terminal:
        note(message)
    with spinner:
        yield spinner


def progress() -> Progress:
    """A bar with steps, time taken and time left; drawn on terminals only."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=ERR,
        # Elsewhere rich would leave a bar's last state as a line.
        disable=ERR.quiet or not ERR.is_terminal,
    )


def new_table(*columns: str, left: int = 1) -> Table:
    """A table without lines down its sides: ``left`` columns of words, the others of numbers.

    Long words (a format a layer) are folded, never cut off.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at, name in enumerate(columns):
        words = at < left
        table.add_column(
            name, justify="left" if words else "right", overflow="fold" if words else "ellipsis"
        )
    return table


def counted(number: int, name: str) -> str:
    """'1 line', '2,000 lines'."""
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def in_units(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
