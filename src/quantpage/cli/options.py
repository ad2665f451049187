"""Flags that several commands have, and the two that all have."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantpage import console

if TYPE_CHECKING:
    from quantpage.cli.generation import GenerateRequest

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
Seed = Annotated[int, typer.Option(help="Of the sampling; the same for every prompt.")]
Text = Annotated[
    Path | None, typer.Option(help="English text to read; default: Austen's novels, from Debian.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@dataclass(frozen=True, slots=True)
class AnswerFlags:
    """How answers are made: flags of `generate` and of `chat`."""

    system: System = None
    kv_format: CacheFormat = "int8"
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    seed: Seed = 0
    stop: Stop = None
    page_size: PageSize = 64
    calibration: Calibration = "auto"
    dtype: Dtype = "auto"
    device: Device = "auto"
    weights: Weights = "model"

    def request(
        self, model: str, prompts: Sequence[str], max_new_tokens: int, raw: bool = False
    ) -> "GenerateRequest":
        """The same for ``cli/generation``."""
        from quantpage.cli.generation import GenerateRequest, Sampling

        return GenerateRequest(
            model=model,
            prompts=prompts,
            system=self.system,
            kv_format=self.kv_format,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(self.temperature, self.top_p, self.top_k, self.seed),
            stop=tuple(self.stop or ()),
            page_size=self.page_size,
            calibration=self.calibration,
            dtype=self.dtype,
            device=self.device,
            weights=self.weights,
            raw=raw,
        )


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

    return with_flags(command, function, {name: (hint, False) for name, hint in _common().items()})


def with_answers(function: Callable[..., None]) -> Callable[..., None]:
    """``function`` with the flags of AnswerFlags, which it is given as ``flags``."""
    names = [each.name for each in fields(AnswerFlags)]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        flags = AnswerFlags(**{name: given.pop(name) for name in names})
        function(**given, flags=flags)

    hints = {each.name: (each.type, each.default) for each in fields(AnswerFlags)}
    return with_flags(command, function, hints, without="flags")


def with_flags(
    command: Callable[..., None],
    function: Callable[..., None],
    flags: Mapping[str, tuple[Any, Any]],
    without: str = "",
) -> Callable[..., None]:
    """``command`` with the flags of ``function``, but ``without``, and ``flags``: hint, default."""
    signature = inspect.signature(function)
    own = [each for name, each in signature.parameters.items() if name != without]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for name, (hint, default) in flags.items()
    ]
    vars(command)["__signature__"] = signature.replace(parameters=[*own, *more])
    hints = {name: hint for name, hint in function.__annotations__.items() if name != without}
    command.__annotations__ = hints | {name: hint for name, (hint, _) in flags.items()}
    return command
