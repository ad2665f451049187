"""`quantpage explain`: the device, what runs for each op and format, and every refusal."""

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.table import Table

from quantpage.console import OUT
from quantpage.explain import example_call, explain, support_matrix
from quantpage.formats import FORMATS, find_format
from quantpage.hardware import device_info, find_device


def command(
    kv_format: Annotated[str | None, typer.Option(help="Only this format.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Model folder: its heads; default: those of an 8B Llama.")
    ] = None,
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
    info = device_info(find_device(device))
    OUT.print(f"device: {info.name} ({info.kind}, {info.processors} processors)")
    heads = {} if model is None else _heads(model)
    names = [find_format(kv_format).name] if kv_format else list(FORMATS)
    table = Table()
    for column in ("format", "op", "runs", "refused, and why"):
        table.add_column(column)
    for name in names:
        for choice in explain(replace(example_call(info, FORMATS[name], mask), **heads)):
            reasons = "\n".join(f"{who}: {why}" for who, why in choice.refusals)
            table.add_row(name, choice.op, choice.chosen or "nothing", reasons or "-")
        table.add_section()
    OUT.print(table)


def _heads(model: str) -> dict[str, Any]:
    """What a model folder's configuration says of a ``Call``."""
    from quantpage.integrations.hf_transformers.model import load_config, model_shape

    shape = model_shape(load_config(model))
    return {
        "dtype": shape.dtype,
        "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "value_head_dim": shape.head_dim,
    }
