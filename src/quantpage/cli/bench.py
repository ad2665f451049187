"""`quantpage bench`: check and time kernels and models on this machine, or draw what was timed."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from quantpage.cli.options import Model, PageSize, with_common, with_flags
from quantpage.files import check_writable

app = typer.Typer(
    invoke_without_command=True,
    help="Check kernels and models against float64, then time them. A failed check reports no "
    "speed. Rows go to a CSV with device, versions and commit.",
)


@app.callback()
def _show_help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


Out = Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")]
CheckOnly = Annotated[
    bool, typer.Option("--check-only", help="Check against float64 and time nothing.")
]
Cases = Annotated[
    str, typer.Option(help="Only these cases: '1 x 4k;8 x 8k' (of write: '64;4096').")
]
Commit = Annotated[str, typer.Option(help="The commit to write into the rows, if git cannot tell.")]
Flex = Annotated[bool, typer.Option(help="Time FlexAttention too, which compiles for long.")]
Part = Annotated[
    str, typer.Option(help="A part of the cases: '2/8' is every eighth from the third on.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of torch and the compiled core; default: one a core."),
]


def _ready(out: Path | None) -> None:
    """What takes long is begun only where it can run and its rows can be written."""
    from quantpage.hardware import find_device

    find_device("cuda")
    check_writable(out, "out")


def decode(
    out: Out = None,
    check_only: CheckOnly = False,
    cases: Cases = "",
    flex: Flex = True,
    part: Part = "0/1",
    commit: Commit = "",
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the roofline from the CSV of --out into this file; time nothing."),
    ] = None,
) -> None:
    """Decode over pages of every format beside torch's kernels on dense bf16 (CUDA)."""
    if plot is not None:
        from quantpage.bench.plots import draw_roofline

        if out is None or not out.is_file():
            raise FileNotFoundError(f"out: expected the CSV to draw from, got {out}")
        check_writable(plot, "plot")
        draw_roofline(out, plot)
        return
    _kernels("decode", out, cases, part, check_only=check_only, flex=flex, commit=commit)


def _kernel_bench(op: str, about: str) -> Callable[..., None]:
    """The command of kernels that no peer is timed beside."""

    def command(
        out: Out = None,
        check_only: CheckOnly = False,
        cases: Cases = "",
        part: Part = "0/1",
        commit: Commit = "",
    ) -> None:
        _kernels(op, out, cases, part, check_only=check_only, commit=commit)

    command.__name__, command.__doc__ = op, about
    return command


latent = _kernel_bench("latent", "Decode over latent rows (MLA) in DeepSeek-V3's shapes (CUDA).")
write = _kernel_bench(
    "write", "The fused write beside copying alone and a plain engine's separate steps (CUDA)."
)


def _kernels(op: str, out: Path | None, cases: str, part: str, **more: Any) -> None:
    """more: fields of KernelsRequest that are what their flags say."""
    _ready(out)
    from quantpage.bench.kernels import KernelsRequest, run

    run(KernelsRequest(op, out, _names(cases, ";"), part=_part(part), **more))


def prefill(
    out: Out = None,
    cases: Cases = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns; a row is their median.")] = 3,
    rest: Annotated[float | None, typer.Option(help="Seconds of rest before each turn.")] = None,
    flex: Annotated[
        str, typer.Option(help="Cases that FlexAttention is timed on too.")
    ] = "1 x 16k",
    commit: Commit = "",
) -> None:
    """Prefill over pages of every format beside cuDNN and FlashAttention on bf16 (CUDA)."""
    _ready(out)
    from quantpage.bench.prefill import run

    run(out, _names(cases, ";"), rounds, rest, _names(flex, ";"), commit)


def masks(
    out: Out = None,
    sizes: Annotated[str, typer.Option(help="Lengths in tokens, comma separated.")] = "8192,32768",
    kinds: Annotated[
        str, typer.Option(help="Kinds of masks, comma separated, causal first; default: all.")
    ] = "",
    steps: Annotated[
        bool, typer.Option("--steps", help="Decode and verification steps too.")
    ] = False,
    check_only: CheckOnly = False,
    check: Annotated[bool, typer.Option(help="Check each case before it is timed.")] = True,
    flex: Flex = True,
    compile_flex: Annotated[
        str,
        typer.Option(help="Only fill FlexAttention's compile cache with this part, such as '2/8'."),
    ] = "",
    commit: Commit = "",
) -> None:
    """Interval masks over int8 pages beside FlexAttention (CUDA)."""
    _ready(out)
    from quantpage.bench.masks import MasksRequest, run
    from quantpage.bench.masks import compile_flex as fill

    tokens = _numbers(sizes, "sizes")
    if compile_flex:
        fill(tokens, _part(compile_flex))
        return
    run(MasksRequest(tokens, _names(kinds), steps, out, commit, flex, check, not check_only))


def gpu_model(
    out: Out = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests in the batch.")] = 16,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens that each request has cached.")
    ] = 16384,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps in a round.")] = 16,
    formats: Annotated[
        str, typer.Option(help="Formats to time, comma separated.")
    ] = "none,int8,fp8,k8v4,int4",
    profile: Annotated[bool, typer.Option("--profile", help="List the kernels of a step.")] = False,
    commit: Commit = "",
) -> None:
    """An 8B-shaped model's prompt and decode steps, as CUDA graphs (CUDA)."""
    _ready(out)
    from quantpage.bench.gpu_model import GpuModelRequest, run

    names = tuple(_choices(formats))
    run(GpuModelRequest(batch, context, layers, steps, names, profile, out, commit))


def cpu(
    out: Out = None,
    threads: Threads = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="About this many seconds for each case.")
    ] = 8.0,
    cases: Cases = "",
    formats: Annotated[
        str,
        typer.Option(
            help="Formats to time, comma separated; keys and values apart: k=int8,v=int4."
        ),
    ] = "int8,int4,k8v4,fp8,none",
) -> None:
    """The compiled core's attention beside SDPA and a plain read (CPU)."""
    check_writable(out, "out")
    from quantpage.bench.cpu import run

    names = _choices(formats)
    run(out, threads or _all_threads(), seconds, _names(cases, ";"), names)


def cpu_model(
    model: Model,
    out: Out = None,
    threads: Threads = None,
    contexts: Annotated[
        str, typer.Option(help="Contexts in tokens, comma separated.")
    ] = "512,2048,8192",
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Time prompts instead of decode steps.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed of each.")] = 24,
    formats: Annotated[
        str,
        typer.Option(
            help="Formats to time, comma separated, also by layer; default: int8,int4,none."
        ),
    ] = "",
) -> None:
    """A real model's decode steps beside Transformers' cache (CPU)."""
    check_writable(out, "out")
    from quantpage.bench.cpu_model import run

    tokens = _numbers(contexts, "contexts")
    names = _choices(formats)
    run(model, out, threads or _all_threads(), tokens, prompts, steps, names)


def bookkeeping(
    out: Out = None,
    operations: Annotated[int, typer.Option(min=64, help="Operations of each case.")] = 1_000_000,
) -> None:
    """Pools, requests and the prefix cache, without a tensor (CPU)."""
    check_writable(out, "out")
    from quantpage.bench.bookkeeping import measure

    measure(operations, out)


def memory(
    model: Annotated[str, typer.Option(help="A model folder.")] = "",
    shape: Annotated[
        str, typer.Option(help="Instead of --model: a known model's heads, windows and layers.")
    ] = "",
    out: Out = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 4096,
    formats: Annotated[
        str, typer.Option(help="Formats to measure, comma separated.")
    ] = "none,int8,int8_exact,fp8,k8v4,int4",
    page_size: PageSize = 64,
    threads: Threads = None,
) -> None:
    """The memory that a prompt takes and leaves taken, beside Transformers' own cache."""
    check_writable(out, "out")
    from quantpage.bench.memory import SHAPES, run

    if bool(model) == bool(shape) or (shape and shape not in SHAPES):
        raise ValueError(
            f"model, shape: expected a folder or one of {', '.join(SHAPES)}; got {model or shape!r}"
        )
    run(
        model or shape,
        _choices(formats),
        context,
        page_size,
        threads or _all_threads(),
        out,
    )


def plots(
    results: Annotated[Path, typer.Option(help="Folder with the CSV files.")] = Path(
        "benchmarks/results"
    ),
    images: Annotated[Path, typer.Option(help="Folder to write the pictures to.")] = Path(
        "docs/images"
    ),
) -> None:
    """Draw the pictures of the docs from benchmarks/results."""
    from quantpage.bench.plots import PICTURES

    sources = {results / f"{name}.csv": draw for name, draw in PICTURES.items()}
    missing = [str(source) for source in sources if not source.is_file()]
    if missing:
        raise FileNotFoundError(f"results: expected {', '.join(missing)}, found none")
    images.mkdir(parents=True, exist_ok=True)
    for source, draw in sources.items():
        target = images / f"{source.stem}.png"
        draw(source, target)
        print(target)


def _all_threads() -> int:
    import torch

    return torch.get_num_threads()


def _choices(formats: str) -> list[str]:
    from quantpage.formats.per_layer import split_choices

    return split_choices(formats)


def _names(text: str, by: str = ",") -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(by) if name.strip())


def _numbers(text: str, name: str) -> tuple[int, ...]:
    words = _names(text)
    if not words or not all(each.isdecimal() and int(each) for each in words):
        raise ValueError(f"{name}: expected numbers of tokens separated by ',', got {text!r}")
    return tuple(map(int, words))


def _part(text: str) -> tuple[int, int]:
    """'2/8' -> (2, 8)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"part: expected i/n with i below n, such as 0/8; got {text!r}")
    return int(index), int(count)


Base = Annotated[
    str,
    typer.Option(
        help="Time this commit (or the checkout in this folder) too, in turns; print before, "
        "after and their ratio."
    ),
]


def with_base(function: Callable[..., None]) -> Callable[..., None]:
    """``function`` with ``--base``."""

    @functools.wraps(function)
    def command(*, base: str = "", **given: Any) -> None:
        if not base:
            function(**given)
            return
        check_writable(given["out"], "out")
        from quantpage.bench.base import compare

        plain = {
            name: each.default for name, each in inspect.signature(function).parameters.items()
        }
        # What is as it would be is not said: the other tree may not know the flag.
        said = {n: each for n, each in given.items() if n != "out" and each != plain[n]}
        compare(function.__name__, said, given["out"], base)

    return with_flags(command, function, {"base": (Base, "")})


_TIMED: tuple[Callable[..., None], ...] = (
    decode, latent, write, prefill, masks, gpu_model, cpu, cpu_model, bookkeeping,
)  # fmt: skip
_OTHERS: tuple[Callable[..., None], ...] = (memory, plots)
for _command in (*map(with_base, _TIMED), *_OTHERS):
    app.command(_command.__name__.replace("_", "-"))(with_common(_command))
