"""Rows of benches: on stdout under one header as they are measured, in a CSV after each."""

import csv
import io
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from quantpage.bench.cases import Case
from quantpage.files import write
from quantpage.hardware import device_info


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    op: str
    case: str
    implementation: str
    format: str
    requests: int
    new: int
    context: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    microseconds: float
    """Of one layer, everything it launches included."""
    bytes: int
    """That must be read: codes and scales of the keys that are seen, exact rows of those in exact
    pages. Of writes, all that is read and written."""
    tb_per_s: float
    of_copy: float
    """Share of the copy bandwidth measured in the same run."""
    error: float
    """|out - exact| / |exact| against float64 over the same cache."""
    timing: str


def row_of(
    op: str, case: Case, format_name: str, ours: tuple[str, str], measured: Sequence[float]
) -> Row:
    """A row; ours: names of case and implementation. measured: us, bytes, copy in TB/s, error."""
    name, implementation = ours
    time, moved, copy, error = measured
    speed = moved / time / 1e6
    return Row(
        op, name, implementation, format_name, case.requests, case.new, case.context, case.q_heads,
        case.kv_heads, case.head_dim, case.page_size, round(time, 2), int(moved), round(speed, 3),
        round(speed / copy, 3), float(f"{error:.1e}"), "graph, cold L2",
    )  # fmt: skip


@cache
def current_commit() -> str:
    """Short hash of the checkout, empty outside one."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def environment(device: str, commit: str = "") -> dict[str, str]:
    """What a row says of the machine and the software. commit: where git is not at hand."""
    about = {"device": device_info(device).name, "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        try:
            about["triton"] = version("triton")
        except PackageNotFoundError:
            about["triton"] = "-"
    return about | {"commit": commit or current_commit() or "-"}


def name_absent(modules: Mapping[str, str]) -> None:
    """Say which peers, by their modules, are not installed."""
    for name, module in modules.items():
        if find_spec(module.split(".")[0]) is None:
            print(f"absent: {name}")


def write_table(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """A new CSV file of records that have the same keys; it is there whole or as it was before."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, file.getvalue())


def _read_table(path: Path, columns: Sequence[str]) -> list[dict[str, object]]:
    """The rows of a CSV file; ValueError where it is none that has ``columns``."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[dict[str, object]] = list(reader)
            head = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"csv: expected a file of these rows, got {path} ({error})") from error
    missing = [name for name in columns if name not in head]
    if missing or any(None in row or None in row.values() for row in rows):
        why = f"without {', '.join(missing)}" if missing else "whose lines differ in length"
        raise ValueError(f"csv: expected a new file or one of these rows, got {path} {why}")
    return rows


class RowPrinter:
    """Rows on stdout as they are measured, in columns under one header."""

    def __init__(self, **widths: int) -> None:
        """``widths``: of each field that is printed, in order; negative: to the right."""
        self._widths = widths
        self._started = False

    def __call__(self, row: Mapping[str, object]) -> None:
        """Print one row, and before the first of them the header."""
        if not self._started:
            self._line({name: name.replace("microseconds", "us") for name in self._widths})
            self._started = True
        self._line(row)

    def _line(self, row: Mapping[str, object]) -> None:
        cells = []
        for name, width in self._widths.items():
            value = row[name]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(text.ljust(width) if width > 0 else text.rjust(-width))
        print(" ".join(cells).rstrip(), flush=True)


class Rows:
    """What a bench has measured so far: printed, and written again after each."""

    def __init__(
        self, out: Path | None, about: Mapping[str, str], same: Sequence[str] = (), /, **widths: int
    ) -> None:
        """out: the CSV. about: of every row (``environment``). same: columns by which a measurement
        is known again; with some, rows that the file has already stay in it (``there``). widths:
        see ``RowPrinter``.

        Raises ValueError where such a file is none of these rows.
        """
        self._out, self._about, self._same = out, about, same
        self._show = RowPrinter(**widths)
        self.made: list[dict[str, object]] = []
        if same and out is not None and out.exists():
            self.made += _read_table(out, [*same, *about])

    def there(self, row: Mapping[str, object]) -> bool:
        """Whether the file had a measurement with this row's values of the columns ``same``."""
        wanted = {name: str({**row, **self._about}[name]) for name in self._same}
        return any(wanted == {name: str(had[name]) for name in self._same} for had in self.made)

    def add(self, row: Mapping[str, object] | Row) -> None:
        """One more."""
        values = asdict(row) if isinstance(row, Row) else row
        self.made.append({**values, **self._about})
        self._show(self.made[-1])
        if self._out is not None:
            write_table(self.made, self._out)
