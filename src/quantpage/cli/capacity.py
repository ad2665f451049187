"""`quantpage capacity`: how many tokens and requests fit in a memory, per format."""

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from quantpage.console import OUT
from quantpage.errors import FormatError
from quantpage.formats import FORMATS, KVFormat

if TYPE_CHECKING:
    from quantpage.integrations.hf_transformers.model import ModelShape

_UNITS = {"B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def command(
    model: Annotated[str, typer.Option(help="Model folder (only its configuration is read).")],
    memory: Annotated[str, typer.Option(help="Memory for the cache, such as 40GiB or 800MB.")],
    context: Annotated[int, typer.Option(help="Tokens of one request.")] = 8192,
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 64,
) -> None:
    """Tokens and requests that fit, per format, from the layout that the cache allocates."""
    from quantpage.integrations.hf_transformers.model import load_config, model_shape

    budget = parse_bytes(memory)
    if context < 1:
        raise ValueError(f"context: expected at least 1 token, got {context}")
    shape = model_shape(load_config(model))
    table = Table(
        title=f"{budget / 2**30:.4g} GiB, {shape.layers} layers, {shape.kv_heads} kv_heads, "
        f"head_dim {shape.head_dim}, page_size {page_size}",
        title_justify="left",
    )
    for column in ("format", "bytes a token", "tokens", f"requests of {context:,}", "against none"):
        table.add_column(column, justify="left" if column == "format" else "right")
    baseline = tokens_in(budget, shape, FORMATS["none"], page_size)
    refused = []
    for name, each in FORMATS.items():
        try:
            per_token = shape.layers * shape.layout(each, page_size).bytes_per_token()
        except FormatError as error:
            table.add_row(name)
            refused.append(f"{name}: not for this head_dim. {error}")
            continue
        tokens = tokens_in(budget, shape, each, page_size)
        requests = requests_in(budget, shape, each, page_size, context)
        ratio = f"{tokens / baseline:.2f}x" if baseline else "-"
        table.add_row(name, f"{per_token:,}", f"{tokens:,}", f"{requests:,}", ratio)
    OUT.print(table)
    for reason in refused:
        OUT.print(reason)


def parse_bytes(text: str) -> int:
    """'40GiB' -> 42949672960; ValueError says what was expected."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    # 40G and 40Gi are read as 40GB and 40GiB.
    unit = match.group(2).upper().removesuffix("B") + "B" if match and match.group(2) else ""
    size = int(float(match.group(1)) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size < 1:
        raise ValueError(f"memory: expected a number and a unit such as 40GiB, got {text!r}")
    return size


def tokens_in(budget: int, shape: "ModelShape", kv_format: KVFormat, page_size: int) -> int:
    """Tokens of one request that fill ``budget``: whole pages, its exact pages counted."""
    layout = shape.layout(kv_format, page_size)
    left = budget // shape.layers - layout.exact_bytes_per_request()
    return max(0, layout.pages_in(left)) * page_size


def requests_in(
    budget: int, shape: "ModelShape", kv_format: KVFormat, page_size: int, context: int
) -> int:
    """Requests of ``context`` tokens that fit, each with its own last page and exact pages."""
    layout = shape.layout(kv_format, page_size)
    pages = -(-context // page_size)
    request = pages * layout.bytes_per_page() + layout.exact_bytes_per_request()
    return budget // (shape.layers * request)
