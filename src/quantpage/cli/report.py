"""`quantpage report`: what a model loses by each format, as a page for a colleague."""

from pathlib import Path
from typing import Annotated

import typer

from quantpage import console
from quantpage.cli.options import Arithmetic, AsJson, Calibration, Device, Model, PageSize, Text


def command(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(help="The page to write; data and pictures go beside it.", show_default=False),
    ],
    formats: Annotated[
        str,
        typer.Option(
            help="Formats to measure, comma separated; int8,int4,first2=int8 are two, the second "
            "by layer. Default: all dynamic ones."
        ),
    ] = "",
    text: Text = None,
    windows: Annotated[int, typer.Option(min=1, help="Places in the text.")] = 2,
    scored: Annotated[int, typer.Option(min=1, help="Predictions compared in each place.")] = 1472,
    answers: Annotated[
        int, typer.Option(min=1, help="Answers that the model writes itself, compared too.")
    ] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 64,
    needles: Annotated[
        str, typer.Option(help="Lengths of texts that hide a needle, comma separated; '': none.")
    ] = "256,512,1024",
    advice: Annotated[
        bool,
        typer.Option(
            help="Measure each layer alone, to advise formats by layer; a third of the time."
        ),
    ] = True,
    context: Annotated[
        int, typer.Option(min=1, help="Longest context that decode is timed at.")
    ] = 8192,
    page_size: PageSize = 64,
    dtype: Arithmetic = "float32",
    calibration: Calibration = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what each cache format changes, and write it up as one HTML page.

    The page has predictions on text and on the model's own answers, layers and heads, needles,
    memory, speed, and a verdict in words. It takes minutes for the demo's model on a CPU. Finished
    parts are kept beside the page, so that an interrupted report, or one with another format,
    continues from them.
    """
    from quantpage.formats.per_layer import split_choices
    from quantpage.report import ReportRequest, make

    request = ReportRequest(
        model=model,
        out=out,
        formats=tuple(split_choices(formats)),
        text=text,
        windows=windows,
        scored=scored,
        answers=answers,
        steps=steps,
        needle_lengths=read_lengths(needles),
        advice=advice,
        context=context,
        page_size=page_size,
        dtype=dtype,
        device=device,
        calibration=calibration,
    )
    report = make(request)
    if as_json:
        console.print_json(report)
        return
    verdict = report["verdict"]
    console.print_line(verdict["headline"])
    for reason in verdict["reasons"]:
        console.print_line(f"- {reason}")
    console.print_line(verdict["flag"])
    console.note(f"written: {request.out}, {request.data}")


def read_lengths(text: str) -> tuple[int, ...]:
    """'256,512' -> (256, 512); ValueError says what was expected."""
    words = [each.strip() for each in text.split(",") if each.strip()]
    if not all(each.isdecimal() and int(each) > 0 for each in words):
        raise ValueError(f"needles: expected lengths such as 256,512, got {text!r}")
    return tuple(sorted({int(each) for each in words}))
