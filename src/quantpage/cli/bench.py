"""`quantpage bench`: check and time the kernels on this CUDA device, or draw what was timed."""

from pathlib import Path
from typing import Annotated

import typer

OPS = ("decode", "write")


def command(
    op: Annotated[str, typer.Argument(help="decode or write.")],
    out: Annotated[Path | None, typer.Option(help="Write a CSV row a measurement here.")] = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Check against float64, time nothing.")
    ] = False,
    flex: Annotated[
        bool, typer.Option(help="Time FlexAttention too; it compiles for long.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the roofline from the CSV of --out; time nothing.")
    ] = None,
) -> None:
    """Check every case against float64, then time it: cold caches, random pages, CUDA graphs.

    A case whose check fails is an error; no speed is printed for it. Peers that are installed are
    timed in the same run, absent ones are named.
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(OPS)}; got {op!r}")
    if plot is not None:
        from quantpage.bench.plots import draw_roofline

        if out is None or not out.is_file():
            raise FileNotFoundError(f"out: expected the CSV to draw from, got {out}")
        draw_roofline(out, plot)
        return
    from quantpage.bench.__main__ import main

    main(op, out, check_only, flex=flex)
