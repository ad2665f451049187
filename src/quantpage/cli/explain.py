"""`quantpage explain`: the device, what runs for each op and format, and every refusal."""

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from quantpage.explain import example_call, explain, support_matrix
from quantpage.formats import FORMATS, find_format
from quantpage.hardware import device_info


def command(
    kv_format: Annotated[str | None, typer.Option(help="Only this format.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    mask: Annotated[str, typer.Option(help="causal, full or interval.")] = "causal",
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Print the README's support matrix and stop.")
    ] = False,
) -> None:
    """Say which implementation serves each op and format here, and why the others refused."""
    if matrix:
        print(support_matrix())
        return
    if mask not in ("causal", "full", "interval"):
        raise ValueError(f"mask: expected causal, full or interval, got {mask!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    info = device_info(device)
    console = Console()
    console.print(f"device: {info.name} ({info.kind}, {info.processors} processors)")
    names = [find_format(kv_format).name] if kv_format else list(FORMATS)
    table = Table()
    for column in ("format", "op", "runs", "refused, and why"):
        table.add_column(column)
    for name in names:
        for choice in explain(example_call(info, FORMATS[name], mask)):
            reasons = "\n".join(f"{who}: {why}" for who, why in choice.refusals)
            table.add_row(name, choice.op, choice.chosen or "nothing", reasons or "-")
        table.add_section()
    console.print(table)
