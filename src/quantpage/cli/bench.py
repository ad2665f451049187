"""`quantpage bench`: check and time kernels and models on this machine, or draw what was timed."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    help="Check every case against float64, then time it; a red check reports no speed. Rows go to "
    "a CSV with device, versions and commit.",
)

FORWARDED = {
    "prefill": ("prefill", "Prefill over pages of every format beside cuDNN on dense bf16 (CUDA)."),
    "masks": ("masks", "Interval masks over int8 pages beside FlexAttention (CUDA)."),
    "gpu-model": ("gpu_model", "An 8B-shaped model's decode steps as CUDA graphs (CUDA)."),
    "cpu": ("cpu", "The compiled core's attention beside SDPA and a plain read (CPU)."),
    "cpu-model": ("cpu_model", "A real model's decode steps beside Transformers' cache (CPU)."),
}
"""Command -> module of quantpage.bench that reads its own flags, and its help."""

Out = Annotated[Path | None, typer.Option(help="Write a CSV row a measurement here.")]
CheckOnly = Annotated[
    bool, typer.Option("--check-only", help="Check against float64, time nothing.")
]
Cases = Annotated[
    str, typer.Option(help="Only these, separated by ';': '1 x 4k;8 x 8k' (write: '64;4096').")
]


@app.command("decode")
def decode(
    out: Out = None,
    check_only: CheckOnly = False,
    cases: Cases = "",
    flex: Annotated[
        bool, typer.Option(help="Time FlexAttention too; it compiles for long.")
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the roofline from the CSV of --out; time nothing.")
    ] = None,
) -> None:
    """Decode over pages of every format, beside torch's kernels on dense bf16 (CUDA)."""
    if plot is not None:
        from quantpage.bench.plots import draw_roofline

        if out is None or not out.is_file():
            raise FileNotFoundError(f"out: expected the CSV to draw from, got {out}")
        draw_roofline(out, plot)
        return
    from quantpage.bench.__main__ import main

    main("decode", out, check_only, flex=flex, cases=cases)


@app.command("write")
def write(out: Out = None, check_only: CheckOnly = False, cases: Cases = "") -> None:
    """The fused write beside the copy bandwidth and a plain engine's separate steps (CUDA)."""
    from quantpage.bench.__main__ import main

    main("write", out, check_only, cases=cases)


def _forward(name: str, module: str, summary: str) -> None:
    """A command whose flags, ``--help`` too, are read by the bench's own parser."""

    def command(context: typer.Context) -> None:
        sys.argv = [f"quantpage bench {name}", *context.args]
        import_module(f"quantpage.bench.{module}").main()

    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, help=summary, context_settings=settings, add_help_option=False)(command)


for _name, (_module, _summary) in FORWARDED.items():
    _forward(_name, _module, _summary)
