"""`quantpage evaluate`: what each format costs in accuracy, on real text."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantpage import console
from quantpage.cli.options import Arithmetic, AsJson, Calibration, Device, Model, PageSize, Text
from quantpage.files import check_writable, write

if TYPE_CHECKING:
    from quantpage.evaluate.run import EvaluateRequest
    from quantpage.evaluate.table import Row


def command(
    model: Model,
    text: Text = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Formats to measure, comma separated; int8,int4,first2=int8 are two, the second "
            "by layer. Default: all dynamic ones, and Transformers' if installed."
        ),
    ] = "",
    windows: Annotated[
        int | None, typer.Option(min=1, help="Places in the text; default: 2 (1 with --budget).")
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens read first in each; default: 1024 (512 with --budget)."),
    ] = None,
    scored: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens scored in each; default: 1024 (256 with --budget)."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Find the formats by layer that lose least within so many bits a number "
            "(5.0bits), out of --formats (default: int8,int4), and print the --kv-format line."
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(min=1, help="With --budget: tokens of the request whose bits are counted."),
    ] = 8192,
    page_size: PageSize = 64,
    dtype: Arithmetic = "float32",
    calibration: Calibration = "auto",
    csv: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score real text through each cache format and compare with the unquantized cache.

    The prompt and then the scored tokens go through the cache as in generation (teacher-forced).
    Transformers' own quantized caches are scored too if their packages are installed
    (optimum-quanto, hqq); they compute the prompt unquantized and keep up to 128 recent tokens so.
    --budget quantizes the keys and the values of each layer alone, one forward each, and looks for
    the best sum.
    """
    from quantpage.evaluate import table
    from quantpage.evaluate.run import EvaluateRequest, evaluate
    from quantpage.formats.per_layer import split_choices

    read = {"text": text, "calibration": Path(calibration)}
    check_writable(csv, "csv", read)
    check_writable(markdown, "markdown", {**read, "csv": csv})
    usual = (2, 1024, 1024) if budget is None else (1, 512, 256)
    request = EvaluateRequest(
        model=model,
        text=text,
        formats=tuple(split_choices(formats)),
        windows=windows or usual[0],
        prompt=prompt or usual[1],
        scored=scored or usual[2],
        page_size=page_size,
        dtype=dtype,
        device=device,
        calibration=calibration,
    )
    if budget is not None:
        if markdown is not None:
            raise ValueError("markdown: expected none with --budget, which writes --csv or --json")
        _advise(request, budget, context, csv, as_json)
        return
    rows = evaluate(request)
    if as_json:
        console.print_json([asdict(row) for row in rows])
    else:
        _print(rows, request.prompt)
    if csv is not None:
        write(csv, table.to_csv(rows))
    if markdown is not None:
        write(markdown, table.to_markdown(rows))


def _advise(
    request: "EvaluateRequest", budget: str, context: int, csv: Path | None, as_json: bool
) -> None:
    from quantpage.cli.evaluate_budget import as_data, parse_bits, print_advice, to_csv
    from quantpage.evaluate.run import advise_model
    from quantpage.hardware import find_device

    found, text = advise_model(request, parse_bits(budget), context)
    if csv is not None:
        write(csv, to_csv(found, request, text, find_device(request.device).type))
    if as_json:
        console.print_json(as_data(found))
    else:
        print_advice(found)


def _print(rows: "list[Row]", prompt: int) -> None:
    from quantpage.evaluate import table

    title = f"{rows[0].tokens:,} tokens of {rows[0].text}, each after {prompt:,} or more"
    console.OUT.print(table.to_table(rows, title))
