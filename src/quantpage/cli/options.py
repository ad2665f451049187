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
from quantpage.cli.interrupts import leaving_at_once

if TYPE_CHECKING:
    from quantpage.cli.generation import GenerateRequest

Model = Annotated[
    str,
    typer.Option(
        help="A model: folder, .gguf file, or id on the Hugging Face hub.",
        show_default=False,
    ),
]
ModelOrWord = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model: folder, .gguf file, or id on the Hugging Face hub; required.",
        show_default=False,
    ),
]
"""For commands whose first word may be the model as well; ``model_and_rest`` finds it."""
MOST = 1 << 16
"""Of anything that a model is told in; above it is a slip of the hand."""

ModelOrNone = Annotated[
    str | None,
    typer.Option(
        help="A model: folder, config.json, .gguf file, or id on the hub; no weights are read."
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Instead of --model: layers that have keys and values."),
]
KVHeads = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Instead of --model: key-value heads of a layer."),
]
HeadDim = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Instead of --model: channels of a head.")
]
TP = Annotated[
    int, typer.Option(min=1, help="Devices that share the heads; one of them is counted.")
]
PageSize = Annotated[int, typer.Option(help="Tokens in a page: 16, 32, 64, 128 or 256.")]
Device = Annotated[str, typer.Option(help="Where to run: auto, cpu, cuda or cuda:N.")]
Calibration = Annotated[
    str,
    typer.Option(
        help="How keys are scaled before they are quantized: auto (from the weights, if keys have "
        "biases or norms), none, or a file made by `quantpage calibrate`."
    ),
]
CacheFormat = Annotated[
    str,
    typer.Option(
        help="Cache format, such as int8. Keys and values apart: k=int8,v=int4. By layer: "
        "int4,first2=int8 or int4,layers=9-11:int8."
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Of weights and arithmetic: auto, float32, bfloat16 or float16.")
]
Arithmetic = Annotated[
    str, typer.Option(help="Of weights and arithmetic: float32, bfloat16 or float16.")
]
"""For what is measured, in one dtype whatever the model was saved in."""
Weights = Annotated[
    str, typer.Option(help="model: as they are; int8: linear layers quantized (CPU only).")
]
System = Annotated[
    str | None, typer.Option(help="System prompt, given through the model's chat template.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[
    float,
    typer.Option(help="0: always the likeliest token (greedy); 1: sample as the model predicts."),
]
TopP = Annotated[
    float,
    typer.Option(help="Sample from the likeliest tokens that have this probability; 1: all."),
]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0: all.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text; may be given several times."),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling, the same for every prompt.")]
Text = Annotated[
    Path | None, typer.Option(help="English text to read; default: Austen's novels, fetched once.")
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


def model_and_rest(model: str | None, words: Sequence[str] | None) -> tuple[str, list[str]]:
    """(the model, the words behind it): --model, or the first word that is no flag.

    Raises ValueError for none, and for two.
    """
    words = list(words or ())
    first = words.pop(0) if words and not words[0].startswith("-") else None
    if model is not None and first is not None:
        raise ValueError(f"model: expected one, got {model} and {first}")
    found = first if model is None else model
    if found is None:
        raise ValueError("model: expected --model, got none")
    return found, words


@functools.cache
def _common() -> dict[str, Any]:
    return {
        "quiet": Annotated[
            bool, typer.Option("--quiet", "-q", help="Print nothing on stderr but errors.")
        ],
        "verbose": Annotated[
            bool,
            typer.Option(
                "--verbose",
                "-v",
                help="Show other libraries' messages, and where an error came from.",
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
        with leaving_at_once():
            import torch  # noqa: F401  all commands need it
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
