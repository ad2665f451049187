"""Flags that several commands have, and the two that all have."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from quantpage import console

Model = Annotated[
    str, typer.Option(help="Folder of a Hugging Face decoder, or a .gguf file.", show_default=False)
]
PageSize = Annotated[int, typer.Option(help="Tokens a page: 16, 32, 64, 128 or 256.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Calibration = Annotated[
    str,
    typer.Option(
        help="Of cached keys: auto (from the weights, where keys have biases), none, or a file of "
        "`quantpage calibrate`."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@functools.cache
def _common() -> dict[str, Any]:
    return {
        "quiet": Annotated[
            bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")
        ],
        "verbose": Annotated[
            bool,
            typer.Option(
                "--verbose", "-v", help="Other libraries' messages, and where an error came from."
            ),
        ],
    }


def with_common(function: Callable[..., None]) -> Callable[..., None]:
    """``function`` with the flags that every command has."""

    @functools.wraps(function)
    def command(*args: Any, quiet: bool = False, verbose: bool = False, **kwargs: Any) -> None:
        console.ERR.quiet = quiet
        if verbose:
            os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        else:
            console.quiet_libraries()
        function(*args, **kwargs)

    signature = inspect.signature(function)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
        for name, hint in _common().items()
    ]
    parameters = [*signature.parameters.values(), *more]
    vars(command)["__signature__"] = signature.replace(parameters=parameters)
    command.__annotations__ = {**function.__annotations__, **_common()}
    return command
