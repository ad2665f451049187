"""The `quantpage` command. A module a command; each turns flags into one call of the library."""

import os
import sys

import typer

from quantpage.cli import accuracy, bench, capacity, explain, formats, generate
from quantpage.errors import QuantPageError

app = typer.Typer(
    name="quantpage",
    help="Attention over quantized pages: run a model with a quantized KV cache, measure what it "
    "saves and what it loses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.command)
app.command("evaluate")(accuracy.command)
app.command("capacity")(capacity.command)
app.command("formats")(formats.command)
app.command("explain")(explain.command)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run a command; an error the user can act on is one line on stderr and exit code 2."""
    # Read when transformers is imported: its advice is for its own users, not for ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (QuantPageError, ValueError, OSError) as error:
        print(f"quantpage: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("quantpage: interrupted", file=sys.stderr)
        sys.exit(130)
