"""Rows of a CSV as they were written, and tables as pages have them."""

import csv
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MISSING = "-"

Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    """The rows of a file in benchmarks/results."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown, a line a row."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
