"""From a model folder to a server that answers."""

import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantpage import console, cpu_core
from quantpage.cache.sizes import LayerPlan
from quantpage.engine import Engine, Limits
from quantpage.engine.sizes import fit_pages, pool_bytes, unquantized_pool_bytes
from quantpage.hardware import available_bytes, find_device
from quantpage.server.metrics import Metrics
from quantpage.server.options import ServeOptions
from quantpage.server.serving import Served

_MAX_REQUESTS, _MAX_WAITING, _STEP_TOKENS, _DRAIN = 64, 256, 256, 60
"""Where the options leave them to the engine."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def serve(options: ServeOptions, engine: str = "auto", more: Sequence[str] = ()) -> None:
    """Load, bind, answer until SIGTERM or Ctrl-C; answers under way are finished first.

    engine: 'vllm' becomes vLLM's own server, with ``more`` of its flags; 'embedded' is ours;
    'auto' is vLLM where it is installed and does what the options say.
    """
    import uvicorn

    from quantpage.server.app import create_app
    from quantpage.server.stopping import DrainingServer
    from quantpage.server.vllm import become, choose

    with bind(options.host, options.port) as listener:
        if options.host not in ("127.0.0.1", "localhost", "::1") and options.api_key is None:
            _say(f"warning: other machines reach {options.host}, and calls need no --api-key")
        command = choose(engine, options, more)
        if command is not None:
            listener.close()
            become(command)
        attached, served = load(options)
        # From here on clients are taken; those that come before the loop runs wait a moment.
        listen(listener, options.host)
        host, port = listener.getsockname()[:2]
        _say(f"{served.name} on http://{host}:{port} (OpenAI: /v1; a page to chat: /)")
        # uvicorn, when it is done, sends itself the signal that stopped it: a clean end is 0.
        signal.signal(signal.SIGTERM, lambda *_: None)
        app = create_app(served, options.api_key, allow_origins=options.allow_origins)
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        seconds = _DRAIN if options.drain is None else options.drain
        try:
            DrainingServer(config, served.engine, seconds).run(sockets=[listener])
            if served.prefix_file is not None:
                pages = served.engine.save_prefixes(served.prefix_file)
                _say(f"{pages:,} pages of known prompts are in {served.prefix_file}")
        finally:
            served.engine.stop()
            attached.detach()


def load(options: ServeOptions) -> tuple[Any, Served]:
    """(attached model, what is served), the engine running."""
    # Wanted by the first answer with a schema; missing, it is told before a model is loaded.
    import llguidance  # noqa: F401

    import quantpage
    from quantpage.integrations.hf_transformers.keys.key_maps import check_calibration
    from quantpage.integrations.hf_transformers.loading.model import (
        check_format,
        load_model,
        most_positions,
        text_config,
    )

    _refuse_small_steps(options)
    device = find_device(options.device)
    check_format(options.model, options.kv_format)
    check_calibration(options.calibration, options.kv_format, options.model)
    _say(f"loading {options.model} on {device}")
    if lost := cpu_core.loss(device.type):
        _say(lost)
    model, tokenizer = load_model(options.model, options.dtype, device, options.weights)
    longest = most_positions(model.config) or 1 << 20
    context = options.context or longest
    if context > longest:
        raise ValueError(f"context: expected at most the model's {longest} tokens, got {context}")
    attached = quantpage.attach(
        model,
        options.kv_format,
        page_size=options.page_size,
        calibration=options.calibration,
    )
    layers = _layers(model, attached)
    limits = _limits(options, layers, context, device)
    held, plain = pool_bytes(layers, limits), unquantized_pool_bytes(layers, limits)
    _refuse_more_than_free(held, device)
    _say(
        f"cache: {options.kv_format}, {limits.pages:,} pages = "
        f"{limits.pages * options.page_size:,} tokens, {held / 2**20:,.0f} MiB "
        f"({plain / 2**20:,.0f} in 16 bit)"
    )
    if device.type == "cuda":
        _say("compiling what kernels are not in Triton's cache")
    engine = Engine(attached, tokenizer, limits, options.prefix_cache, warm_up=True)
    name = options.name or Path(options.model).resolve().name
    text, generation = text_config(model.config), model.generation_config
    stop = generation.eos_token_id if generation.eos_token_id is not None else text.eos_token_id
    served = Served(
        name=name,
        engine=engine,
        tokenizer=tokenizer,
        context=min(context, (limits.pages - 1) * options.page_size),
        stop_tokens=frozenset([stop] if isinstance(stop, int) else stop or ()),
        vocabulary=text.vocab_size,
        defaults=_defaults(generation),
        metrics=Metrics(name, engine, (plain - held) // limits.pages),
        prefix_file=None if options.prefix_cache_file is None else Path(options.prefix_cache_file),
    )
    try:
        if served.prefix_file is not None and served.prefix_file.exists():
            known = engine.load_prefixes(served.prefix_file)
            _say(f"{known:,} pages of known prompts from {served.prefix_file}")
    except BaseException:
        engine.stop()
        attached.detach()
        raise
    return attached, served


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before anything slow: a port that is taken is known at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Named, as asyncio looks at it: over anything but TCP an answer's second part waits, on a
        # connection that is kept, until the client has confirmed the first (40 ms).
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return listener


def listen(listener: socket.socket, host: str) -> None:
    """Take clients on a socket of ``bind``; ValueError where another that was bound meanwhile does.

    A bound socket that does not listen yet keeps nobody else from the port.
    """
    try:
        listener.listen(128)
    except OSError as error:
        raise _cannot_listen(host, listener.getsockname()[1], error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> ValueError:
    return ValueError(f"host, port: cannot listen on {host}:{port}: {error}")


def _layers(model: Any, attached: Any) -> list[LayerPlan]:
    """The pages of every layer, in the dtype that the model was loaded in."""
    from quantpage.integrations.hf_transformers.sizes import cache_shape

    shape = replace(cache_shape(model.config), dtype=model.dtype)
    return shape.layers(attached.formats, attached.options.page_size)


def _limits(
    options: ServeOptions, layers: Sequence[LayerPlan], context: int, device: torch.device
) -> Limits:
    """What the options and the memory allow; by default as much as every answer may need, and no
    more than a quarter of what is free."""
    running = options.max_requests or _MAX_REQUESTS
    limits = Limits(
        pages=running * -(-context // options.page_size),
        max_running=running,
        max_waiting=options.max_waiting or _MAX_WAITING,
        step_tokens=max(options.step_tokens or _STEP_TOKENS, running),
    )
    if options.memory is None:
        free = available_bytes(device)
        if free is None:
            raise ValueError("memory: expected --memory where what is free is unknown, got none")
        return fit_pages(layers, limits, free // 4)
    # More than all answers need is kept for prompts that were seen before.
    growing = [each for each in layers if not each.reach.limited]
    a_page = sum(each.layout.bytes_per_page() for each in growing)
    most = max(limits.pages, options.memory // a_page if a_page else 0)
    return fit_pages(layers, replace(limits, pages=most), options.memory)


def _refuse_small_steps(options: ServeOptions) -> None:
    running = options.max_requests or _MAX_REQUESTS
    if options.step_tokens is not None and options.step_tokens < running:
        raise ValueError(
            f"step_tokens: expected at least max_requests {running}, so that every answer gets a "
            f"token, got {options.step_tokens}"
        )


def _refuse_more_than_free(size: int, device: torch.device) -> None:
    """A CPU gives memory when it is written to: too much would end the process in mid-answer."""
    free = available_bytes(device) if device.type == "cpu" else None
    if free is not None and size > free:
        raise ValueError(f"memory: expected at most the {free:,} bytes that are free, got {size:,}")


def _defaults(generation: Any) -> dict[str, float]:
    """The model's own sampling; greedy where it says that it does not sample."""
    found = {name: getattr(generation, name, None) for name in _SAMPLING}
    made = {name: value for name, value in found.items() if value is not None}
    made.setdefault("temperature", 1.0)
    if getattr(generation, "do_sample", None) is False:
        made["temperature"] = 0.0
    return made


def _say(text: str) -> None:
    console.note(f"quantpage: {text}")
