"""`quantpage serve`: an OpenAI-compatible server over a quantized cache."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantpage.cli.capacity import parse_bytes
from quantpage.cli.options import CacheFormat, Calibration, Dtype, Weights
from quantpage.files import check_writable


class EngineName(StrEnum):
    """Who answers."""

    AUTO = "auto"
    VLLM = "vllm"
    EMBEDDED = "embedded"


def command(
    model: Annotated[
        str, typer.Argument(help="Folder of a decoder, a .gguf, or an id of the hub.")
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(help="After --: further flags of vLLM's server.", metavar="[-- FLAGS]"),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="vllm: its server with our plugin; auto: that, where it is installed."),
    ] = EngineName.AUTO,
    kv_format: CacheFormat = "int8",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Ask for it in every call.", envvar="QUANTPAGE_API_KEY"),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Of the cache, such as 4GiB.")] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Answers that share a step; embedded: 64.")
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(min=1, help="Answers that wait for a place; embedded: 256."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a prompt and its answer.")
    ] = None,
    step_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a step, prompts in chunks; embedded: 256.")
    ] = None,
    drain: Annotated[
        int | None,
        typer.Option(min=0, help="Seconds to finish answers in at the end; embedded: 60."),
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens a page: 16, 32, 64, 128 or 256.")] = 64,
    calibration: Calibration = "auto",
    prefix_cache: Annotated[bool, typer.Option(help="Remember prompts' pages.")] = True,
    prefix_cache_file: Annotated[
        Path | None,
        typer.Option(help="Keep them over restarts: read at the start, written at the end."),
    ] = None,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    weights: Weights = "model",
) -> None:
    """Serve a model to OpenAI clients: chat, completions, streams, tools, JSON schemas.

    Requests share steps (continuous batching), known beginnings of prompts are found in their
    pages. Where vLLM is installed and serves the model, it is vLLM's own server with our pages;
    otherwise the embedded engine: one model on one device, without speculative decoding, adapters
    and pictures.
    """
    check_writable(prefix_cache_file, "prefix_cache_file")
    from quantpage.server.options import ServeOptions
    from quantpage.server.run import serve

    serve(
        ServeOptions(
            model=model,
            kv_format=kv_format,
            page_size=page_size,
            calibration=None if calibration == "none" else calibration,
            host=host,
            port=port,
            name=name,
            api_key=api_key,
            memory=None if memory is None else parse_bytes(memory),
            max_requests=max_requests,
            max_waiting=max_waiting,
            context=context,
            step_tokens=step_tokens,
            drain=drain,
            prefix_cache=prefix_cache,
            prefix_cache_file=None if prefix_cache_file is None else str(prefix_cache_file),
            dtype=dtype,
            device=device,
            weights=weights,
        ),
        engine,
        more or (),
    )
