"""`quantpage calibrate`: what text says of a model's keys, in a file for attach and evaluate."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from quantpage import console
from quantpage.cli.options import Device, Dtype, Model, Text
from quantpage.files import check_writable

if TYPE_CHECKING:
    from quantpage.formats.key_statistics import ChosenMap
    from quantpage.integrations.hf_transformers.keys.measured import Measured
    from quantpage.integrations.hf_transformers.keys.statistics import Placed


WINDOW = 2048
"""Tokens of a text whose late queries look as those of long contexts do."""


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    text: Text = None,
    kv_format: Annotated[
        str, typer.Option(help="The format, also by layer, that the calibration is chosen for.")
    ] = "int4",
    scales: Annotated[
        str,
        typer.Option(help="How a static format's scales are chosen: absmax, percentile or mse."),
    ] = "mse",
    feedback: Annotated[
        bool,
        typer.Option(
            help="Let each channel's rounding make up for the errors of those before it: more "
            "exact, and on a GPU slower to write."
        ),
    ] = True,
    tokens: Annotated[
        int, typer.Option(min=256, help="Tokens read, spread evenly over the text.")
    ] = 8192,
    window: Annotated[
        int | None,
        typer.Option(
            min=128, help="Tokens read in one forward; default: 2048, or as many as there are."
        ),
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            min=128,
            help="The longest context to serve, in tokens: texts are measured at positions up to "
            "it, or to the model's last.",
        ),
    ] = 8192,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure a model's keys and queries on text, so that its keys lose less when quantized.

    The file holds a mean and a scale for each channel of each layer's keys, and how they are
    rounded; the cache keeps its size. Give it to --calibration of generate, chat, serve, evaluate
    and report, or to attach(calibration=...). An interrupted run continues from a file with
    --out's name and .part, written every twenty seconds.
    """
    from quantpage.cache.tensor_file import check_replaceable
    from quantpage.cli.generation import DTYPES
    from quantpage.evaluate.score import cut_windows
    from quantpage.evaluate.text import default_path, obtain, read
    from quantpage.formats.channel_ranges import Rule
    from quantpage.formats.per_layer import LayerFormats
    from quantpage.hardware import find_device
    from quantpage.integrations.hf_transformers.keys.calibration import KIND, calibrate
    from quantpage.integrations.hf_transformers.keys.measured import KIND as PART
    from quantpage.integrations.hf_transformers.keys.measured import Measured, mark_of
    from quantpage.integrations.hf_transformers.keys.statistics import longest_context, placed
    from quantpage.integrations.hf_transformers.loading.model import (
        load_config,
        load_model,
        model_shape,
        most_positions,
    )

    part = out.with_name(f"{out.name}.part")
    for path, kind in ((out, KIND), (part, PART)):
        check_writable(path, "out")
        check_replaceable(path, "out", kind)
    chosen = LayerFormats.parse(kv_format)
    config = load_config(model)
    formats = chosen.of_layers(model_shape(config).layers)
    for name, given, known in (("dtype", dtype, DTYPES), ("scales", scales, get_args(Rule))):
        if given not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}; got {given!r}")
    positions = most_positions(config)
    if window is None:
        window = min(WINDOW, tokens, max(128, context), positions or WINDOW)
    _check_window(window, tokens, positions)
    content = read(obtain(default_path()) if text is None else text)
    where = find_device(device)
    with console.status(f"loading {model}"):
        loaded, tokenizer = load_model(model, dtype, where)
    windows = cut_windows(tokenizer, content, tokens // window, window - 1, 1)
    most = longest_context(loaded)
    context = max(window, context if most is None else min(context, most))
    texts = placed([each.tokens for each in windows], context)
    mark = mark_of(loaded, texts, not all(each.dynamic for each in formats))
    measured = Measured.load(part, mark) or Measured()
    note = {
        "text": "austen.txt" if text is None else text.name,
        "tokens": len(windows) * window,
        "context": context,
        "kv_format": chosen.name,
    }
    table: list[tuple[int, ChosenMap]] = []
    made = calibrate(
        loaded,
        _going_on(texts, measured, part, mark),
        formats,
        note,
        lambda index, each: table.append((index, each)),
        scales,  # type: ignore[arg-type]
        measured,
        feedback,
    )
    made.save(out)
    part.unlink(missing_ok=True)
    if table:
        _print(table)
    if made.static:
        console.print_line(f"static scales of {len(made.static)} layers for {chosen.name}")
    console.note(f"written: {out}")


def _check_window(window: int, tokens: int, positions: int | None) -> None:
    """ValueError for windows that neither the text nor the model has room for."""
    if window > tokens:
        raise ValueError(f"window: expected at most --tokens {tokens:,}, got {window:,}")
    if positions is not None and window > positions:
        raise ValueError(
            f"window: expected at most the model's {positions:,} positions, got {window:,}"
        )


def _going_on(
    texts: "Sequence[Placed]", measured: "Measured", part: Path, mark: str
) -> "Iterator[Placed]":
    """The texts that are not measured yet, with progress; what is measured is kept in ``part``."""
    count = len(texts)
    with console.progress() as progress:
        task = progress.add_task("measuring", total=count, completed=measured.texts)
        if not progress.console.is_terminal:
            console.note(f"measuring {count:,} windows of {texts[0].tokens.shape[1]:,} tokens")
        if measured.texts:
            console.note(f"{measured.texts:,} of them were measured before ({part})")
        for each in measured.left(texts, part, mark):
            yield each
            progress.advance(task)


def _print(table: "Sequence[tuple[int, ChosenMap]]") -> None:
    console.print_line("layer  error of scores, plain -> mapped    a/b of each kv_head")
    for index, each in table:
        chosen_by = " ".join(f"{a:g}/{b:g}" for a, b in each.exponents)
        console.print_line(
            f"{index:5d}  {each.plain_loss:.1e} -> {each.loss:.1e}{'':22}{chosen_by}"
        )
    console.note(
        "error: squared, relative to the scores' own size. A channel's scale is W^a / C^b, of the "
        "queries' metric W and the keys' variance C, and where keys are rounded in turn what was "
        "found from there (docs/key-maps.md)."
    )
