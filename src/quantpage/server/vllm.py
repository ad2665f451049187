"""vLLM's own server with QuantPage as its attention backend: which flags of ours are which of its.

Everything here is decided from what is given, so that it is tested without a vLLM.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkstemp
from typing import Any, NoReturn

import torch

from quantpage import console
from quantpage.errors import QuantPageError, Unavailable
from quantpage.formats import KVFormat
from quantpage.formats.per_layer import LayerFormats
from quantpage.hardware import available_bytes
from quantpage.integrations.hf_transformers.keys.calibration import calibrate_random
from quantpage.integrations.hf_transformers.keys.statistics import key_traits
from quantpage.integrations.hf_transformers.loading.checkpoint import find_files, tensor_names
from quantpage.integrations.hf_transformers.loading.model import (
    load_config,
    load_model,
    model_shape,
)
from quantpage.integrations.vllm_plugin.formats import (
    CALIBRATION,
    CHOOSABLE,
    SERVED,
    exact_page,
)
from quantpage.integrations.vllm_plugin.here import VllmHere, find_vllm
from quantpage.server.options import ServeOptions

LACKS = "one device, no speculative decoding, no adapters, no pictures"
"""What whoever gets the embedded engine does without."""
_NO_VLLM = (ValueError, QuantPageError, ImportError, OSError, RuntimeError)
"""Why vLLM cannot serve: what it does not do, and how an installation of it may fail."""
_MOST_PAGES = 16
"""Pages of a block at most."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What its folder says of the model."""

    architectures: tuple[str, ...]
    head_dim: int
    dtype: torch.dtype
    key_traits: tuple[str, ...] = ()
    """'biases' or 'norms' of its keys, which ask for key maps (``statistics.key_traits``)."""
    gguf: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A process to become."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    """Besides this process's own; what nobody should read off a list of processes."""


def build_command(
    options: ServeOptions, model: ServedModel, here: VllmHere, more: Sequence[str] = ()
) -> Command:
    """vLLM's server as ``options`` say, with ``more`` of its own flags behind them.

    Raises ValueError, with the option's name, for what vLLM does not serve so.
    """
    form = _format(options, model, here)
    flags: dict[str, Any] = {
        "--model": options.model,
        "--served-model-name": options.name or Path(options.model).resolve().name,
        "--host": options.host,
        "--port": options.port,
        # Without the flag vLLM lets pages of all origins call it.
        "--allowed-origins": json.dumps(options.allow_origins) if options.allow_origins else None,
        # One backend stands for ours on a CPU, where none is chosen by name.
        "--attention-backend": None if here.cpu else "CUSTOM",
        **_cache_flags(form, here, options.calibration),
        "--block-size": _block_size(form, options.page_size, model),
        "--dtype": None if options.dtype == "auto" else options.dtype,
        "--max-model-len": options.context,
        "--max-num-seqs": options.max_requests,
        "--max-num-batched-tokens": options.step_tokens,
    }
    environment = {}
    if options.api_key is not None:
        environment["VLLM_API_KEY"] = options.api_key
    if options.memory is not None and here.cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, options.memory >> 30))
    elif options.memory is not None:
        flags["--kv-cache-memory-bytes"] = options.memory
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in flags.items():
        if value is not None:
            arguments += [name, str(value)]
    if "--additional-config" in flags and any(_names(each, "additional-config") for each in more):
        raise ValueError(
            "flags after --: expected no --additional-config beside the one that "
            f"{options.kv_format} and calibration need, got {shlex.join(more)}"
        )
    if not options.prefix_cache:
        arguments.append("--no-enable-prefix-caching")
    return Command((*arguments, *more), environment)


def choose(engine: str, options: ServeOptions, more: Sequence[str]) -> Command | None:
    """The command of vLLM's server; None, having said why, where the embedded engine serves.

    engine: 'auto', 'vllm' or 'embedded'. Raises ValueError or Unavailable where vllm was asked
    for and cannot be, and where ``more`` flags are for a vLLM that does not serve.
    """
    if engine not in ("auto", "vllm", "embedded"):
        raise ValueError(f"engine: expected auto, vllm or embedded, got {engine!r}")
    why = "as asked"
    if engine != "embedded":
        try:
            here = find_vllm()
            if here is None:
                raise Unavailable("vLLM is not installed (pip install 'quantpage[vllm]')")
            model = describe(options.model)
            command = build_command(options, model, here, more)
            if asks_for_maps(options, model):
                options = replace(
                    options, calibration=measure_maps(options.model, options.kv_format)
                )
                command = build_command(options, model, here, more)
            return command
        except _NO_VLLM as error:
            if engine == "vllm":
                raise
            why = str(error)
    if more:
        raise ValueError(
            f"flags after --: expected none for the embedded engine ({why}), got {shlex.join(more)}"
        )
    console.note(f"quantpage: embedded engine ({why}): {LACKS}")
    return None


def describe(path: str) -> ServedModel:
    """What ``build_command`` asks of a model's folder; no weights are read."""
    config = load_config(path)
    shape = model_shape(config)
    folder, gguf = find_files(path)
    return ServedModel(
        architectures=tuple(config.architectures or ()),
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        key_traits=tuple(key_traits(tensor_names(folder))),
        gguf=gguf is not None,
    )


def asks_for_maps(options: ServeOptions, model: ServedModel) -> bool:
    """Whether keys in few bits lose much by what they have in common, and no file says what."""
    key = LayerFormats.of(options.kv_format).default.key
    few = key.quantized and key.code.bits < 8
    return few and bool(model.key_traits) and options.calibration == "auto"


def measure_maps(path: str, kv_format: str) -> str:
    """A file of key maps from a model's weights, as ``attach`` makes them, for vLLM's processes.

    Reads the model once more than vLLM does, on the CPU. The file stays where temporary files are.
    Raises ValueError for a model that cannot be measured, or is larger than the free memory.
    """
    console.note(
        f"quantpage: measuring the keys of {path} on random tokens; a file of "
        "`quantpage calibrate` does better (--calibration FILE)"
    )
    size = sum(each.stat().st_size for each in find_files(path)[0].glob("*.safetensors"))
    free = available_bytes()
    if free is not None and size > free:
        raise ValueError(
            f"calibration: expected a file or none for a model of {size:,} bytes where {free:,} "
            "of memory are free, as measuring its keys reads it once more"
        )
    try:
        model = load_model(path)[0]
        formats = LayerFormats.of(kv_format).of_layers(model_shape(model.config).layers)
        made = calibrate_random(model, formats)
    except (ValueError, QuantPageError) as error:
        raise ValueError(
            "calibration: expected a file or none for a model that cannot be measured here; "
            f"{error}"
        ) from error
    handle, name = mkstemp(prefix="quantpage-keys-")
    os.close(handle)
    made.save(name)
    return name


def become(command: Command) -> NoReturn:
    """Print the command, and be it."""
    # Names alone: a key is nobody's to read.
    names = "".join(f"{name}=... " for name in sorted(command.environment))
    console.note(f"quantpage: {names}{shlex.join(command.arguments)}")
    environment = {**os.environ, **command.environment}
    os.execve(command.arguments[0], command.arguments, environment)


def _format(options: ServeOptions, model: ServedModel, here: VllmHere) -> KVFormat:
    """The format of all layers; ValueError for every option that vLLM cannot follow."""
    served = [each for each in model.architectures if each in here.architectures]
    if model.gguf or not served:
        what = "a .gguf file" if model.gguf else " or ".join(model.architectures) or "no class"
        raise ValueError(f"model: expected one that vLLM {here.version} serves, got {what}")
    formats = LayerFormats.of(options.kv_format)
    form = formats.default
    if formats.rules or (form.name not in SERVED and form.quantized):
        raise ValueError(
            f"kv_format: expected one for all layers of none, {', '.join(SERVED)}, as vLLM takes "
            f"them; got {options.kv_format!r}"
        )
    device = "cpu" if here.cpu else "cuda"
    for name, given, wanted in (
        ("device", options.device.partition(":")[0], ("auto", device)),
        ("prefix_cache_file", options.prefix_cache_file, (None,)),
        ("max_waiting", options.max_waiting, (None,)),
        ("drain", options.drain, (None,)),
        ("weights", options.weights, ("model",)),
        ("port", options.port, range(1, 1 << 16)),
    ):
        if given not in wanted:
            raise ValueError(f"{name}: expected what vLLM {here.version} can do, got {given}")
    return form


def _names(argument: str, flag: str) -> bool:
    """Whether an argument is ``flag``, in any of the ways that vLLM takes."""
    return argument.partition("=")[0].partition(".")[0].replace("_", "-") == f"--{flag}"


def _cache_flags(form: KVFormat, here: VllmHere, calibration: str) -> dict[str, str]:
    if not form.quantized:
        return {}
    told = (
        {} if calibration in ("auto", "none") else {CALIBRATION: str(Path(calibration).resolve())}
    )
    name = f"{form.name}_per_token_head"
    if here.own_names:
        name = f"quantpage_{form.name}"
    elif name not in CHOOSABLE:
        name, told["quantpage"] = CHOOSABLE[0], form.name
    more = {"--additional-config": json.dumps(told)} if told else {}
    return {"--kv-cache-dtype": name, **more}


def _block_size(form: KVFormat, page_size: int, model: ServedModel) -> int:
    """Tokens of a block: a page; with exact pages, the fewest pages that take a whole one in 16
    bits."""
    if form.exact_pages is None:
        return page_size
    widths = (model.head_dim, model.head_dim)
    for pages in range(1, _MOST_PAGES + 1):
        try:
            found = exact_page(form, pages * page_size, widths, model.dtype)
        except ValueError:
            continue
        if found >= min(page_size, 64):
            return pages * page_size
    raise ValueError(f"page_size: expected one whose blocks hold an exact page, got {page_size}")
