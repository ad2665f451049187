"""The commands in one application, and how each of them may end: the table of exit codes."""

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import quantpage
from quantpage.cli import (
    bench,
    calibrate,
    capacity,
    chat,
    compare,
    doctor,
    evaluate,
    explain,
    formats,
    generate,
    report,
    serve,
)
from quantpage.cli.exit_codes import BROKEN_PIPE, INTERRUPTED, UNAVAILABLE, WRONG_INPUT
from quantpage.cli.options import with_common
from quantpage.errors import QuantPageError, Unavailable

EXTRAS = {
    "transformers": "transformers",
    "accelerate": "transformers",
    "gguf": "transformers",
    "jinja2": "report",
    "matplotlib": "report",
    "fastapi": "serve",
    "llguidance": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
}
"""A package that a command may find absent -> the extra of quantpage that brings it."""

app = typer.Typer(
    name="quantpage",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _module in (
    ("generate", generate),
    ("chat", chat),
    ("serve", serve),
    ("evaluate", evaluate),
    ("report", report),
    ("compare", compare),
    ("calibrate", calibrate),
    ("capacity", capacity),
    ("formats", formats),
    ("explain", explain),
    ("doctor", doctor),
):
    app.command(_name)(with_common(_module.command))
app.add_typer(bench.app, name="bench")

# Where typer stands on click the class is click's, elsewhere its own: it has a name in neither.
_UsageError: Any = next(
    each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException"
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"quantpage {quantpage.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run language models with a quantized key-value cache; measure what it saves and loses."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run a command; the exit code. What the user can act on is one sentence on stderr."""
    verbose = "--verbose" in arguments or "-v" in arguments
    try:
        code = app(list(arguments), prog_name="quantpage", standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        where = "quantpage" if context is None else context.command_path
        said = error.format_message().strip().removesuffix(".")
        return _say(f"{said} (see {where} --help)", WRONG_INPUT, verbose)
    except SystemExit as error:
        # So rich and typer leave when the reader of stdout has gone, as `head` does.
        return BROKEN_PIPE if error.code == 1 else int(error.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        if sys.stdout.isatty():
            # An answer may stand on the line.
            print()
        return _say("interrupted", INTERRUPTED, verbose)
    except Unavailable as error:
        return _say(str(error), UNAVAILABLE, verbose)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        message = f"this needs the package {error.name}: pip install 'quantpage[{extra}]'"
        return _say(message, UNAVAILABLE, verbose)
    except (QuantPageError, ValueError, OSError) as error:
        return _say(str(error), WRONG_INPUT, verbose)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            # So Python 3.11 tells of one that comes while a class is made: an import, here.
            return _say("interrupted", INTERRUPTED, verbose)
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        first = (str(error).splitlines() or ["no more memory"])[0]
        return _say(f"out of memory: {first}", UNAVAILABLE, verbose)
    return _say("interrupted", INTERRUPTED, verbose) if code == INTERRUPTED else code or 0


def _say(message: str, code: int, verbose: bool) -> int:
    if verbose and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"quantpage: {message}", file=sys.stderr)
    return code
