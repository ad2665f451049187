"""`quantpage formats`: every format, generated from FORMATS."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from quantpage.formats import ALIASES, FORMATS, KVFormat, QuantSpec


def command(
    model: Annotated[
        str | None, typer.Option(help="Model folder: adds the bytes one of its tokens takes.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Channels of a head, for bits a value.")] = 128,
) -> None:
    """List the cache formats: bits, who owns a scale, static or dynamic, bytes a token."""
    shape = None
    if model is not None:
        from quantpage.integrations.hf_transformers.model import load_config, model_shape

        shape = model_shape(load_config(model))
        head_dim = shape.head_dim
    table = Table(title=f"Formats at head_dim {head_dim}", title_justify="left")
    for column in ("format", "keys", "values", "bits a value K/V", "exact pages", "also known as"):
        table.add_column(column)
    if shape is not None:
        table.add_column("bytes a token", justify="right")
    for name, each in FORMATS.items():
        row = [
            name,
            _describe(each.key, head_dim),
            _describe(each.value, head_dim),
            f"{each.key.bits_per_value(head_dim):.4g} / {each.value.bits_per_value(head_dim):.4g}",
            _exact(each),
            ", ".join(alias for alias, target in ALIASES.items() if target == name) or "-",
        ]
        if shape is not None:
            row.append(f"{shape.layers * shape.layout(each, 64).bytes_per_token():,}")
        table.add_row(*row)
    Console().print(table)


def _describe(spec: QuantSpec, head_dim: int) -> str:
    if not spec.quantized:
        return "as they are"
    group = spec.granularity.group
    owner = (
        "tensor"
        if not spec.granularity.per_head
        else "channel"
        if group == 1
        else "kv_head"
        if group is None or group >= head_dim
        else f"{group} channels"
    )
    words = [spec.code.name, f"scale a {'token and ' if spec.dynamic else ''}{owner}"]
    if spec.zero_point:
        words.append("zero point")
    if spec.rotation != "none":
        words.append("rotated")
    words.append("dynamic" if spec.dynamic else "static")
    return ", ".join(words)


def _exact(kv_format: KVFormat) -> str:
    kept = kv_format.exact_pages
    return "-" if kept is None else f"first and current ({kept.kept_pages} kept)"
