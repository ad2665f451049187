"""`quantpage evaluate`: what each format costs in accuracy, on real text."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantpage import console
from quantpage.cli.options import AsJson, Calibration, Device, Model, PageSize, Text
from quantpage.files import check_writable, write
from quantpage.formats.per_layer import split_choices

if TYPE_CHECKING:
    from quantpage.evaluate.report import Row
    from quantpage.evaluate.run import EvaluateRequest


def command(
    model: Model,
    text: Text = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Names, or one a layer, comma separated: int8,int4,first2=int8 are two; default: "
            "all dynamic ones and the peers found."
        ),
    ] = "",
    windows: Annotated[
        int | None, typer.Option(min=1, help="Places in the text; default: 2, with --budget 1.")
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens read first in each window; default: 1024 or 512."),
    ] = None,
    scored: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens scored in each window; default: 1024 or 256."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Find the choice a layer that loses least within so many bits a number "
            "(5.0bits), of --formats (default: int8,int4), and print its --kv-format line."
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of the request whose bits --budget counts.")
    ] = 8192,
    page_size: PageSize = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    calibration: Calibration = "auto",
    csv: Annotated[Path | None, typer.Option(help="Write every figure to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score real text through each cache format and compare with the unquantized cache.

    Teacher-forced as in generation: the prompt, then the scored tokens, all through the cache.
    The quantized caches of Transformers are scored too where their packages are installed
    (optimum-quanto, hqq); the forward of their prompt and up to 128 recent tokens are unquantized.
    With --budget every layer's keys and values are quantized alone, one forward each, and the best
    sum is looked for; progress says how long it takes.
    """
    from quantpage.evaluate import report
    from quantpage.evaluate.run import EvaluateRequest, evaluate

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
        write(csv, report.to_csv(rows))
    if markdown is not None:
        write(markdown, report.to_markdown(rows))


def _advise(
    request: "EvaluateRequest", budget: str, context: int, csv: Path | None, as_json: bool
) -> None:
    from quantpage.cli import advice as said
    from quantpage.evaluate.run import advise_model
    from quantpage.hardware import find_device

    found, text = advise_model(request, said.parse_bits(budget), context)
    if csv is not None:
        write(csv, said.to_csv(found, request, text, find_device(request.device).type))
    if as_json:
        console.print_json(said.as_data(found))
    else:
        said.print_advice(found)


def _print(rows: "list[Row]", prompt: int) -> None:
    from quantpage.evaluate import report

    title = f"{rows[0].tokens:,} tokens of {rows[0].text}, each after {prompt:,} or more"
    console.OUT.print(report.to_table(rows, title))
