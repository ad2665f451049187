"""`quantpage bench`: check and time kernels and models on this machine, or draw what was timed."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from quantpage.cli.options import Model, with_common, with_flags
from quantpage.files import check_writable
from quantpage.formats.per_layer import split_choices
from quantpage.hardware import find_device

app = typer.Typer(
    invoke_without_command=True,
    help="Check every case against float64, then time it; a red check reports no speed. Rows go to "
    "a CSV with device, versions and commit.",
)


@app.callback()
def _show_help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


Out = Annotated[Path | None, typer.Option(help="Write a CSV row a measurement here.")]
CheckOnly = Annotated[
    bool, typer.Option("--check-only", help="Check against float64, time nothing.")
]
Cases = Annotated[
    str, typer.Option(help="Only these, separated by ';': '1 x 4k;8 x 8k' (write: '64;4096').")
]
Commit = Annotated[str, typer.Option(help="Of the rows, where git is not at hand.")]
Flex = Annotated[bool, typer.Option(help="Time FlexAttention too; it compiles for long.")]
Part = Annotated[
    str, typer.Option(help="'2/8': every eighth case from the third on, to compile together.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of torch and the compiled core; default: all cores'.")
]


def _ready(out: Path | None) -> None:
    """What takes long is begun only where it can run and its rows can be written."""
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
        Path | None, typer.Option(help="Draw the roofline from the CSV of --out; time nothing.")
    ] = None,
) -> None:
    """Decode over pages of every format, beside torch's kernels on dense bf16 (CUDA)."""
    if plot is not None:
        from quantpage.bench.plots import draw_roofline

        if out is None or not out.is_file():
            raise FileNotFoundError(f"out: expected the CSV to draw from, got {out}")
        check_writable(plot, "plot")
        draw_roofline(out, plot)
        return
    _kernels("decode", out, check_only, part, flex, commit, cases)


def _kernel_bench(op: str, about: str) -> Callable[..., None]:
    """The command of kernels that no peer is timed beside."""

    def command(
        out: Out = None,
        check_only: CheckOnly = False,
        cases: Cases = "",
        part: Part = "0/1",
        commit: Commit = "",
    ) -> None:
        _kernels(op, out, check_only, part, False, commit, cases)

    command.__name__, command.__doc__ = op, about
    return command


latent = _kernel_bench("latent", "Decode over latent rows (MLA), in DeepSeek-V3's shapes (CUDA).")
write = _kernel_bench(
    "write", "The fused write beside the copy bandwidth and a plain engine's separate steps (CUDA)."
)


def _kernels(
    op: str,
    out: Path | None,
    check_only: bool,
    part: str,
    flex: bool,
    commit: str,
    cases: str,
) -> None:
    _ready(out)
    from quantpage.bench.kernels import run

    run(op, out, check_only, _part(part), flex, commit, _names(cases, ";"))


def prefill(
    out: Out = None,
    cases: Cases = "",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that a row is the median of.")] = 3,
    rest: Annotated[
        float | None, typer.Option(help="Seconds without load before every turn.")
    ] = None,
    flex: Annotated[str, typer.Option(help="Cases that FlexAttention runs too.")] = "1 x 16k",
    commit: Commit = "",
) -> None:
    """Prefill over pages of every format beside cuDNN on dense bf16 (CUDA)."""
    _ready(out)
    from quantpage.bench.prefill import run

    run(out, _names(cases, ";"), rounds, rest, _names(flex, ";"), commit)


def masks(
    out: Out = None,
    sizes: Annotated[str, typer.Option(help="Tokens, separated by ','.")] = "8192,32768",
    kinds: Annotated[str, typer.Option(help="Separated by ',', causal first; default: all.")] = "",
    steps: Annotated[bool, typer.Option("--steps", help="Decode and verification too.")] = False,
    check_only: CheckOnly = False,
    check: Annotated[bool, typer.Option(help="Check before timing.")] = True,
    flex: Flex = True,
    compile_flex: Annotated[
        str, typer.Option(help="'2/8': only fill FlexAttention's compile cache, a part.")
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
    batch: Annotated[int, typer.Option(min=1, help="Requests.")] = 16,
    context: Annotated[int, typer.Option(min=1, help="Tokens each of them has cached.")] = 16384,
    layers: Annotated[int, typer.Option(min=1, help="Of the model.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps a round.")] = 16,
    formats: Annotated[str, typer.Option(help="Separated by ','.")] = "none,int8,fp8,k8v4,int4",
    profile: Annotated[bool, typer.Option("--profile", help="List the kernels of a step.")] = False,
    commit: Commit = "",
) -> None:
    """An 8B-shaped model's decode steps as CUDA graphs (CUDA)."""
    _ready(out)
    from quantpage.bench.gpu_model import GpuModelRequest, run

    names = tuple(split_choices(formats))
    run(GpuModelRequest(batch, context, layers, steps, names, profile, out, commit))


def cpu(
    out: Out = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each case, about.")] = 8.0,
    cases: Cases = "",
    formats: Annotated[
        str, typer.Option(help="Separated by ','; keys and values apart: k=int8,v=int4.")
    ] = "int8,int4,k8v4,fp8,none",
) -> None:
    """The compiled core's attention beside SDPA and a plain read (CPU)."""
    check_writable(out, "out")
    from quantpage.bench.cpu import run

    names = split_choices(formats)
    run(out, threads or torch.get_num_threads(), seconds, _names(cases, ";"), names)


def cpu_model(
    model: Model,
    out: Out = None,
    threads: Threads = None,
    contexts: Annotated[str, typer.Option(help="Tokens, separated by ','.")] = "512,2048,8192",
    prompts: Annotated[bool, typer.Option("--prompts", help="Prompts, not decode steps.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 24,
    formats: Annotated[
        str,
        typer.Option(help="Separated by ',', also one a layer; default: int8, int4 and none."),
    ] = "",
) -> None:
    """A real model's decode steps beside Transformers' cache (CPU)."""
    check_writable(out, "out")
    from quantpage.bench.cpu_model import run

    tokens = _numbers(contexts, "contexts")
    names = split_choices(formats)
    run(model, out, threads or torch.get_num_threads(), tokens, prompts, steps, names)


def bookkeeping(
    out: Out = None,
    operations: Annotated[int, typer.Option(min=64, help="Of each case.")] = 1_000_000,
) -> None:
    """Pools, requests and the prefix cache, without a tensor (CPU)."""
    check_writable(out, "out")
    from quantpage.bench.bookkeeping import measure

    measure(operations, out)


def memory(
    model: Annotated[str, typer.Option(help="Model folder.")] = "",
    shape: Annotated[str, typer.Option(help="Heads, windows and layers of a known model.")] = "",
    out: Out = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 4096,
    formats: Annotated[
        str, typer.Option(help="Separated by ','.")
    ] = "none,int8,int8_exact,fp8,k8v4,int4",
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 64,
    threads: Threads = None,
) -> None:
    """What a prompt leaves in memory and took at most, beside Transformers' own cache."""
    check_writable(out, "out")
    from quantpage.bench.memory import SHAPES, run

    if bool(model) == bool(shape) or (shape and shape not in SHAPES):
        raise ValueError(
            f"model, shape: expected a folder or one of {', '.join(SHAPES)}; got {model or shape!r}"
        )
    run(
        model or shape,
        split_choices(formats),
        context,
        page_size,
        threads or torch.get_num_threads(),
        out,
    )


def plots(
    results: Annotated[Path, typer.Option(help="Folder with the CSV files.")] = Path(
        "benchmarks/results"
    ),
    images: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("docs/images"),
) -> None:
    """Draw the pictures of the docs from committed CSV files, and from nothing else."""
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
        help="Time this commit's tree too (or that in this folder), in turns: before, after, ratio."
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
