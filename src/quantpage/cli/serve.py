"""`quantpage serve`: an OpenAI-compatible server over a quantized cache."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantpage.cli.capacity import parse_bytes
from quantpage.cli.options import (
    CacheFormat,
    Calibration,
    Dtype,
    ModelOrWord,
    PageSize,
    Weights,
    model_and_rest,
)
from quantpage.files import check_writable


class EngineName(StrEnum):
    """Who answers."""

    AUTO = "auto"
    VLLM = "vllm"
    EMBEDDED = "embedded"


def command(
    model: ModelOrWord = None,
    more: Annotated[
        list[str] | None,
        typer.Argument(help="Flags behind -- go to vLLM's server.", metavar="[-- FLAGS]"),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            help="vllm: vLLM's server with our pages; embedded: ours; auto: vllm if it can."
        ),
    ] = EngineName.AUTO,
    kv_format: CacheFormat = "int8",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: its folder's name.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Refuse calls without this key.", envvar="QUANTPAGE_API_KEY"),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let web pages of this origin, such as http://localhost:3000, call the server; "
            "'*': of all. May be given several times."
        ),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory for the cache, such as 4GiB.")] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(min=1, help="Most answers computed at once; default of embedded: 64."),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(min=1, help="Most answers that wait; default of embedded: 256."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of a prompt with its answer.")
    ] = None,
    step_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens computed in a step; default of embedded: 256."),
    ] = None,
    drain: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seconds that answers get to finish at the end; default of embedded: 60."
        ),
    ] = None,
    page_size: PageSize = 64,
    calibration: Calibration = "auto",
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep pages of prompts for requests that begin alike.")
    ] = True,
    prefix_cache_file: Annotated[
        Path | None,
        typer.Option(help="Keep those pages over restarts: read at the start, written at the end."),
    ] = None,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="Where to run: auto, cpu or cuda.")] = "auto",
    weights: Weights = "model",
) -> None:
    """Serve a model to OpenAI clients: chat, completions, streams, tools, JSON schemas.

    If vLLM is installed and serves the model, this starts vLLM's own server over our pages.
    Otherwise the embedded engine answers: one model on one device, with continuous batching and a
    prefix cache, without speculative decoding, adapters and pictures.
    """
    named, flags = model_and_rest(model, more)
    check_writable(prefix_cache_file, "prefix_cache_file")
    from quantpage.server.options import ServeOptions
    from quantpage.server.run import serve

    serve(
        ServeOptions(
            model=named,
            kv_format=kv_format,
            page_size=page_size,
            calibration=calibration,
            host=host,
            port=port,
            name=name,
            api_key=api_key,
            allow_origins=tuple(allow_origin or ()),
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
        flags,
    )
