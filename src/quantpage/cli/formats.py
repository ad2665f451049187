"""`quantpage formats`: every format, generated from FORMATS."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.table import Table

from quantpage.console import OUT
from quantpage.errors import FormatError
from quantpage.formats import ALIASES, FORMATS, KVFormat, QuantSpec


def command(
    model: Annotated[
        str | None, typer.Option(help="Model folder: adds the bytes one of its tokens takes.")
    ] = None,
    head_dim: Annotated[
        int, typer.Option(min=1, help="Channels of a head, for bits a value.")
    ] = 128,
) -> None:
    """List the cache formats: bits, who owns a scale, static or dynamic, bytes a token."""
    shape = None
    if model is not None:
        from quantpage.integrations.hf_transformers.model import load_config, model_shape

        shape = model_shape(load_config(model))
        head_dim = shape.head_dim
    table = Table(title=f"Formats at head_dim {head_dim}", title_justify="left")
    for column in ("format", "codes", "a scale for each", "scales", "bits a value"):
        table.add_column(column)
    if shape is not None:
        table.add_column("bytes a token", justify="right")
    refused = []
    for name, each in FORMATS.items():
        try:
            row = [_of_both(each, describe, head_dim) for describe in _COLUMNS]
            if shape is not None:
                row.append(f"{shape.layers * shape.layout(each, 64).bytes_per_token():,}")
        except FormatError as error:
            row = []
            refused.append(f"{name}: not for this head_dim. {error}")
        table.add_row(name, *row)
    OUT.print(table)
    for reason in refused:
        OUT.print(reason)
    for name, each in FORMATS.items():
        if each.exact_pages is not None:
            OUT.print(
                f"{name}: a query sees the first page, its own and the one before unquantized; "
                f"{each.exact_pages.kept_pages} pages a request are kept so, in 16 bits."
            )
    for name in FORMATS:
        others = ", ".join(alias for alias, target in ALIASES.items() if target == name)
        if others:
            OUT.print(f"{name}: also called {others}.")


def _of_both(kv_format: KVFormat, describe: Callable[[QuantSpec, int], str], head_dim: int) -> str:
    key, value = describe(kv_format.key, head_dim), describe(kv_format.value, head_dim)
    return key if key == value else f"K {key}, V {value}"


def _codes(spec: QuantSpec, head_dim: int) -> str:
    words = [spec.code.name if spec.quantized else "the model's own"]
    if spec.zero_point:
        words.append("with zero")
    if spec.rotation != "none":
        words.append("rotated")
    return " ".join(words)


def _owner(spec: QuantSpec, head_dim: int) -> str:
    if not spec.quantized:
        return "-"
    granularity = spec.granularity
    if not granularity.per_head:
        return "tensor"
    if granularity.group == 1:
        return "channel"
    token = "token, " if spec.dynamic else ""
    if granularity.groups(head_dim) == 1:
        return f"{token}kv_head"
    return f"{token}{granularity.group} channels"


def _when(spec: QuantSpec, head_dim: int) -> str:
    return "-" if not spec.quantized else "dynamic" if spec.dynamic else "static"


def _bits(spec: QuantSpec, head_dim: int) -> str:
    return f"{spec.bits_per_value(head_dim):.4g}"


_COLUMNS = (_codes, _owner, _when, _bits)
