"""`quantpage evaluate`: what each format costs in accuracy, on real text."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantpage import console
from quantpage.cli.options import AsJson, Calibration, Device, Model, PageSize, check_writable
from quantpage.formats.per_layer import split_choices

if TYPE_CHECKING:
    from quantpage.evaluate.report import Row


def command(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option(help="English text to score; default: Austen's novels, from Debian."),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Names, or one a layer, comma separated: int8,int4,first2=int8 are two; default: "
            "all dynamic ones and the peers found."
        ),
    ] = "",
    windows: Annotated[int, typer.Option(min=1, help="Places in the text.")] = 2,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens read first in each window.")] = 1024,
    scored: Annotated[int, typer.Option(min=1, help="Tokens scored in each window.")] = 1024,
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
    """
    from quantpage.evaluate import report
    from quantpage.evaluate.run import EvaluateRequest, evaluate

    check_writable(csv, "csv")
    check_writable(markdown, "markdown")
    rows = evaluate(
        EvaluateRequest(
            model=model,
            text=text,
            formats=tuple(split_choices(formats)),
            windows=windows,
            prompt=prompt,
            scored=scored,
            page_size=page_size,
            dtype=dtype,
            device=device,
            calibration=calibration,
        )
    )
    if as_json:
        console.print_json([asdict(row) for row in rows])
    else:
        _print(rows, prompt)
    if csv is not None:
        report.write(csv, report.to_csv(rows))
    if markdown is not None:
        report.write(markdown, report.to_markdown(rows))


def _print(rows: "list[Row]", prompt: int) -> None:
    from quantpage.evaluate import report

    title = f"{rows[0].tokens:,} tokens of {rows[0].text}, each after {prompt:,} or more"
    console.OUT.print(report.to_table(rows, title))
