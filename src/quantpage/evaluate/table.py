"""The rows of an evaluation as CSV, as markdown and on the terminal."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

from rich import box
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One cache's result, with everything needed to measure it again."""

    cache: str
    bits_per_value: float
    """In the body."""
    bytes_per_token: float
    """Of all layers, in the body, beside a 16-bit model."""
    sixteen_bit_tokens: str
    """Tokens kept in 16 bits beside the body."""
    perplexity: float
    kl_mean: float
    """KL divergence to the unquantized cache, nats a token."""
    kl_p99: float
    kl_max: float
    kl_median: float
    kl_low: float
    """Where the mean lies nine times of ten when the text's pieces of 32 tokens are drawn again."""
    kl_high: float
    top1: float
    """Share of tokens with the same most likely successor."""
    overlap: float
    """Mean share of probability that both give to the same tokens: 1 - total variation distance,
    what sampling sees."""
    tokens: int
    """Scored tokens."""
    windows: int
    prompt: int
    chunk: int
    page_size: int
    calibration: str
    """Where key maps come from: 'auto', 'none' or a file's name."""
    model: str
    text: str
    dtype: str
    device: str
    torch: str
    transformers: str
    quantpage: str
    """Version and commit."""
    date: str


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("cache", lambda row: row.cache),
    ("bits/value", lambda row: f"{row.bits_per_value:.3g}"),
    ("bytes/token", lambda row: f"{row.bytes_per_token:,.0f}"),
    ("in 16 bits", lambda row: row.sixteen_bit_tokens),
    ("perplexity", lambda row: f"{row.perplexity:.3f}"),
    ("mean KL", lambda row: f"{row.kl_mean:.1e}"),
    ("nine times of ten", lambda row: f"{row.kl_low:.1e} to {row.kl_high:.1e}"),
    ("p99 KL", lambda row: f"{row.kl_p99:.1e}"),
    ("max KL", lambda row: f"{row.kl_max:.1e}"),
    ("top-1", lambda row: f"{row.top1:.1%}"),
    ("1 - TVD", lambda row: f"{row.overlap:.2%}"),
)
_WIDE = {"bytes/token", "nine times of ten"}
"""Left out on a terminal, which has no room for them."""


def to_table(rows: Sequence[Row], title: str) -> Table:
    """For the terminal. Headings and words are broken, so that 80 columns hold every figure."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
    columns = [(name, show) for name, show in _COLUMNS if name not in _WIDE]
    for name, _ in columns:
        left = name == "cache"
        heading = name.replace("/", "/\n").replace(" ", "\n", 1)
        # A format a layer is as long as it is; figures are never broken.
        table.add_column(
            heading, justify="left" if left else "right", no_wrap=not left, overflow="fold"
        )
    for row in rows:
        table.add_row(*(show(row).replace(", ", ",\n") for _, show in columns))
    return table


def to_markdown(rows: Sequence[Row]) -> str:
    """For a README."""
    lines = [
        "| " + " | ".join(name for name, _ in _COLUMNS) + " |",
        "|---|" + "---:|" * (len(_COLUMNS) - 1),
    ]
    lines += ["| " + " | ".join(show(row) for _, show in _COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """One line a row, every field."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [each.name for each in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
    return out.getvalue()
