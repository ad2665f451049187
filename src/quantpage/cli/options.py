"""Flags that several commands have, and the two that all have."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from quantpage import console

Model = Annotated[
    str,
    typer.Option(
        help="Folder of a Hugging Face decoder, a .gguf file, or an id of the hub.",
        show_default=False,
    ),
]
PageSize = Annotated[int, typer.Option(help="Tokens a page: 16, 32, 64, 128 or 256.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Calibration = Annotated[
    str,
    typer.Option(
        help="Of cached keys: auto (from the weights, where keys have biases or norms), none, or a "
        "file of `quantpage calibrate`."
    ),
]
CacheFormat = Annotated[
    str,
    typer.Option(
        help="Cache format; keys and values apart: k=int8,v=int4; one a layer: "
        "int4,first2=int8,layers=7,9-11:int8."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Of weights and arithmetic: auto, float32, bfloat16, float16.")
]
Weights = Annotated[str, typer.Option(help="model: as they are; int8: weight-only linears (CPU).")]
System = Annotated[str | None, typer.Option(help="System prompt, for the model's chat template.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[
    float, typer.Option(help="0: the most likely token (greedy); 1: the model's distribution.")
]
TopP = Annotated[float, typer.Option(help="Of tokens that are so probable together; 1: all.")]
TopK = Annotated[int, typer.Option(help="Of so many most likely tokens; 0: all.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")
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
        if verbose:
            os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        else:
            console.quiet_libraries()
        before, console.ERR.quiet = console.ERR.quiet, quiet
        try:
            function(*args, **kwargs)
        finally:
            # Commands are functions: what runs after one in the same process is not silent.
            console.ERR.quiet = before

    return with_flags(command, function, False, _common())


def with_flags(
    command: Callable[..., None], function: Callable[..., None], default: Any, hints: dict[str, Any]
) -> Callable[..., None]:
    """``command`` with the flags of ``function`` and those of ``hints``, which share a default."""
    signature = inspect.signature(function)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, hint in hints.items()
    ]
    parameters = [*signature.parameters.values(), *more]
    vars(command)["__signature__"] = signature.replace(parameters=parameters)
    command.__annotations__ = {**function.__annotations__, **hints}
    return command
