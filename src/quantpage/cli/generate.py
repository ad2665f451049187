"""`quantpage generate`: a model answers through a quantized cache, streaming."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Option(help="Folder of a Hugging Face decoder, or a .gguf file.")],
    prompt: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Read the prompt from a file (-: stdin); with --prompt, both."),
    ] = None,
    kv_format: Annotated[
        str, typer.Option(help="Cache format, or one a layer: int4,first2=int8,last1=int8.")
    ] = "int8",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    page_size: Annotated[int, typer.Option(help="Tokens a page: 16, 32, 64, 128 or 256.")] = 64,
    compare: Annotated[
        bool, typer.Option(help="Also run without quantization and report the agreement.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of weights and arithmetic: auto, float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    weights: Annotated[
        str, typer.Option(help="model: as they are; int8: weight-only linears (CPU).")
    ] = "model",
    raw: Annotated[
        bool, typer.Option(help="Give the prompt as it is, without the chat template.")
    ] = False,
) -> None:
    """Generate text through a quantized, paged cache and report what it took and what it cost.

    Greedy, so that runs compare. --compare teacher-forces the same answer
    through an unquantized cache and counts where the most likely token is
    the same.
    """
    from quantpage.cli.generation import GenerateRequest, run

    if prompt is None and file is None:
        raise ValueError("prompt: expected --prompt or --file, got neither")
    text = "\n\n".join(part for part in (None if file is None else _read(file), prompt) if part)
    run(
        GenerateRequest(
            model=model,
            prompt=text,
            kv_format=kv_format,
            max_new_tokens=max_new_tokens,
            page_size=page_size,
            compare=compare,
            dtype=dtype,
            device=device,
            weights=weights,
            raw=raw,
        )
    )


def _read(file: Path) -> str:
    """The text of a file, a pipe or (-) standard input."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file: expected a text file in UTF-8, got {file} ({error})") from error
    if "\0" in text:
        raise ValueError(f"file: expected a text file in UTF-8, got {file} with NUL bytes")
    return text
