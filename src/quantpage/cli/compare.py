"""`quantpage compare`: two reports beside each other."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantpage import console
from quantpage.cli.options import AsJson
from quantpage.files import check_writable, write

if TYPE_CHECKING:
    from quantpage.report.beside import Comparison


def command(
    a: Annotated[Path, typer.Argument(help="Data of one report (its .json).", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Data of the other (its .json).", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Write a page of both here as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two reports: what was not the same, and each format's figures in both."""
    from quantpage.report import compare, load
    from quantpage.report.beside import render

    check_writable(out, "out", {"a": a, "b": b})
    data = [load(each) for each in (a, b)]
    found = compare(*data)
    if as_json:
        console.print_json(asdict(found))
    else:
        _print(found)
    if out is not None:
        write(out, render(found, *data))
        console.note(f"written: {out}")


def _print(found: "Comparison") -> None:
    for one in found.differences:
        console.print_line(f"{one.what}: A {one.a}, B {one.b}")
    if not found.same_predictions:
        console.print_line("not the same model and text: errors are against different predictions")
    figures = ("bytes a\ntoken", "KL,\nmean", "KL,\n99 %", "top-1", "1 - TVD", "verdict")
    table = console.new_table("format", "", *figures, left=2)
    for each in found.pairs:
        for at, which in enumerate("AB"):
            table.add_row(
                each.format if at == 0 else "",
                which,
                f"{each.bytes_per_token[at]:,.0f}",
                f"{each.kl_mean[at]:.1e}",
                f"{each.kl_p99[at]:.1e}",
                f"{each.top1[at]:.1%}{'*' if each.beyond_noise and at else ''}",
                f"{each.overlap[at]:.4f}",
                each.level[at],
            )
    console.OUT.print(table)
    if any(each.beyond_noise for each in found.pairs):
        console.print_line("*: differs from A by more than chance explains")
    for which, names in zip("AB", found.only, strict=True):
        if names:
            console.print_line(f"only in {which}: {', '.join(names)}")
    a, b = found.take
    console.print_line(f"take {a}, say both" if a == b else f"A says: take {a}; B says: take {b}")
