"""Key maps inside vLLM: out of a file of `quantpage calibrate`, named in --additional-config.

vLLM's models rotate queries and keys themselves and hand them over then, which is where a map is
applied: keys when they are written, queries by the same launch. A tensor-parallel worker holds some
kv_heads of each layer, and takes the maps of those.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from quantpage import console
from quantpage.errors import CorruptCalibration
from quantpage.formats import FORMATS, KeyMap, KVFormat
from quantpage.integrations.hf_transformers.keys.calibration import (
    SAME_MODEL,
    Calibration,
    likeness,
    sampled_places,
)
from quantpage.integrations.hf_transformers.keys.statistics import key_traits
from quantpage.integrations.hf_transformers.loading.checkpoint import find_files, tensor_names
from quantpage.integrations.vllm_plugin.formats import CALIBRATION

_SAMPLED = 8
"""Matrices that say whether a file is of this model."""


@lru_cache(maxsize=4)
def find_calibration(path: str, model: str) -> Calibration:
    """What a file holds; read once a process.

    model: the name that vLLM was given. Raises ValueError where there is no file, and
    CorruptCalibration for one that is broken, or of another model than that folder's.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"--additional-config {CALIBRATION}: expected a file that `quantpage calibrate` wrote, "
            f"got {path}"
        )
    found = Calibration.load(path)
    folder = Path(model)
    kept = found.note.get("weights", {})
    if folder.is_dir() and likeness(kept, _sample(folder, kept)) < SAME_MODEL:
        raise CorruptCalibration(f"{path}: expected one of {model}, got one of another model")
    return found


def key_map(
    found: Calibration,
    path: str,
    layer: int,
    form: KVFormat,
    shape: tuple[int, int],
    heads: tuple[int, int],
) -> KeyMap | None:
    """The map with which a worker's layer writes keys; None: it keeps them as they are.

    path: for words. shape: kv_heads and head_dim of the whole layer. heads: first and end of this
    worker's. Raises FormatError where the layer was measured for a format without a map, and
    CorruptCalibration for a map of other keys.
    """
    # A format a layer: of the others nothing is made.
    formats = [FORMATS["none"]] * (max([layer, *found.layers]) + 1)
    formats[layer] = form
    made = found.maps(formats, path).get(layer)
    if made is None:
        return None
    if (made.kv_heads, made.head_dim) != shape:
        raise CorruptCalibration(
            f"{path}: expected a map of kv_heads, head_dim {shape} for layer {layer}, got "
            f"{(made.kv_heads, made.head_dim)}"
        )
    return made.heads(*heads)


def worker_heads(kv_heads: int, rank: int, workers: int) -> tuple[int, int]:
    """First and end of the kv_heads that a tensor-parallel worker holds; fewer than workers are
    held by several."""
    if kv_heads < workers:
        own = rank * kv_heads // workers
        return own, own + 1
    each = kv_heads // workers
    return rank * each, (rank + 1) * each


@lru_cache(maxsize=4)
def warn_without_maps(model: str, form: KVFormat) -> None:
    """Say, once a process, that keys are of a kind that few bits do badly with."""
    if not Path(model).is_dir() or not form.key.quantized or form.key.code.bits >= 8:
        return
    traits = key_traits(tensor_names(find_files(model)[0]))
    if traits:
        console.note(
            f"quantpage: this model's keys have {' and '.join(traits)}, with which {form.name} "
            f"loses more than it has to: `quantpage calibrate --model {model} --out FILE`, then "
            f'--additional-config \'{{"{CALIBRATION}": "FILE"}}\''
        )


def _sample(folder: Path, kept: Mapping[str, Any]) -> dict[str, list[float]]:
    """``calibration.weights_sample`` of some matrices, out of a folder's files."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                plane = opened.get_slice(name)
                shape = plane.get_shape()
                if name not in kept or len(shape) != 2 or len(found) >= _SAMPLED:
                    continue
                width, places = shape[1], sampled_places(shape[0] * shape[1])
                few = [plane[at // width : at // width + 1] for at in places]
                found[name] = [
                    float(row[0, at % width]) for row, at in zip(few, places, strict=True)
                ]
    return found
