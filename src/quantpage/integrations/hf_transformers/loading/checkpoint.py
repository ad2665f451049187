"""The files of a model folder: which they are, and what is wrong with them, in one sentence each.

Transformers answers a broken checkpoint with a traceback from three libraries below, or fills a
tensor that is missing with random numbers and goes on.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from quantpage.errors import QuantPageError, Unavailable
from quantpage.integrations.hf_transformers.loading.hub import fetch, is_hub_id

_SHOWN = 3
"""Tensors that a sentence names; the rest are counted."""


def find_files(path: str | Path, weights: bool = True) -> tuple[Path, str | None]:
    """The folder that holds a model, and the GGUF file in it where there is no config.json.

    ``path``: the folder, its config.json, a .gguf file, or an id of the hub, of which the
    configuration alone is fetched without ``weights``. Raises FileNotFoundError in one sentence
    when it is no model.
    """
    path = fetch(path, weights) if is_hub_id(path) else Path(path)
    if path.is_file() and path.name == "config.json":
        return path.parent, None
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if not path.is_dir():
        found = "" if path.exists() else ", which does not exist"
        raise FileNotFoundError(
            f"model: expected a model's folder, its config.json or a .gguf file, got {path}{found}"
        )
    if (path / "config.json").is_file():
        return path, None
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return path, ggufs[0].name
    raise FileNotFoundError(
        f"model: expected config.json or one .gguf file in {path}, found "
        f"{len(ggufs)} .gguf files and no config.json"
    )


def check_config(file: Path) -> None:
    """ValueError where a config.json is no JSON object that names a model type."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model: expected JSON in {file}, got {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ValueError(f"model: expected {file} to name a model_type, found none")


def check_weights(folder: Path) -> None:
    """ValueError where a safetensors file is cut short or altered in its header, or a shard is
    missing; reads headers only.
    """
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            shards = json.loads(index.read_text("utf-8"))["weight_map"]
            files = sorted({folder / name for name in shards.values()})
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"model: expected a weight_map in {index}, got {error}") from error
    for file in files:
        if not file.is_file():
            raise ValueError(f"model: expected {file}, which {index.name} names; it is missing")
        check_safetensors(file)


def tensor_names(folder: Path) -> Iterator[str]:
    """The names of all tensors in a folder's safetensors files; their headers alone are read."""
    for file in sorted(folder.glob("*.safetensors")):
        check_safetensors(file)
        with safe_open(file, "pt") as opened:
            yield from opened.keys()


def check_safetensors(file: Path) -> None:
    """ValueError for a file that is not all that its header says."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"model: {file} is broken or incomplete ({file.stat().st_size:,} bytes: {error}); "
            "copy or download it again"
        ) from error


@contextmanager
def errors_in_one_sentence(path: str | Path) -> Iterator[None]:
    """What Transformers raises while it loads ``path``, as ValueError or Unavailable."""
    try:
        yield
    except QuantPageError:
        raise
    except ImportError as error:
        raise Unavailable(
            f"model: {path} needs a package that is absent: {_first(error)}"
        ) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        AttributeError,
        TypeError,
        ArithmeticError,
        AssertionError,
        EOFError,
        StrictDataclassError,
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise ValueError(f"model: could not load {path}: {_first(error)}") from error


def refuse_incomplete(path: str | Path, loading: Mapping[str, Any]) -> None:
    """ValueError where a tensor of the model is not in its files, or is of another shape.

    loading: what ``from_pretrained(output_loading_info=True)`` says.
    """
    for kind, words in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has in another shape"),
        ("error_msgs", "could not be read:"),
    ):
        found = sorted(str(each[0] if isinstance(each, tuple) else each) for each in loading[kind])
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ValueError(
                f"model: expected every tensor of the model in {path}; it {words} "
                f"{', '.join(found[:_SHOWN])}{more}"
            )


def _first(error: BaseException) -> str:
    """The first line of a message that says something, with the next where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
