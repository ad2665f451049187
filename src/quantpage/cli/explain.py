"""`quantpage explain`: what runs here for each op and format, and why the others refused."""

from typing import Annotated

import typer

from quantpage.cli.options import AsJson, Device


def command(
    kv_format: Annotated[
        str | None, typer.Option(help="Only this format; also by layer: int8,last2=int4.")
    ] = None,
    device: Device = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Take the heads of this model; default: those of an 8B Llama."),
    ] = None,
    mask: Annotated[
        str, typer.Option(help="Kind of mask: causal, full, interval or asked.")
    ] = "causal",
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="FORMAT OP",
            help="What each candidate says, as in `--why int8 decode`. Ops: rope_write, prefill, "
            "decode, gather.",
        ),
    ] = None,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix", help="Print the table of what runs where (docs/support.md) and stop."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which implementation serves each op and format here, and why the others refused."""
    from quantpage.cli.explain_tables import ExplainRequest, say

    say(ExplainRequest(kv_format, device, model, mask, why, matrix, as_json))
