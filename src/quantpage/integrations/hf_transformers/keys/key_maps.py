"""Which key maps an attached model gets: none, those of a file, or those its weights ask for."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from quantpage.errors import CorruptCalibration, FormatError
from quantpage.formats import KeyMap, KVFormat, StaticScales
from quantpage.formats.key_statistics import KeyStatistics
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.keys.calibration import (
    Calibration,
    LayerCalibration,
    layers_of_weights,
    takes_means,
)
from quantpage.integrations.hf_transformers.keys.checkpoint_scales import read_checkpoint_scales
from quantpage.integrations.hf_transformers.keys.statistics import (
    has_key_biases,
    has_uneven_key_norms,
    measure_random,
)
from quantpage.integrations.hf_transformers.loading.checkpoint import find_files
from quantpage.integrations.hf_transformers.loading.model import (
    device_of,
    load_config,
    model_shape,
    reaches_of,
)

AUTO, NONE = "auto", "none"
"""Key maps from the weights, where a model's keys have biases or norms; keys as they are, as None
says it, too."""


@dataclass(frozen=True, slots=True)
class KeyMaps:
    """The maps of an attachment, and where they come from."""

    source: str
    """In words, for reports."""
    layers: Mapping[int, KeyMap] = field(default_factory=dict)
    """By layer; a layer without one caches keys as they are."""
    static: StaticScales | None = None
    """Of the layers with a static format."""


def check_calibration(
    given: str | Path | None,
    kv_format: str | KVFormat | LayerFormats,
    model: str | Path | None = None,
) -> None:
    """Refuse, before a model is read, what no model, or not this one, could take with
    ``kv_format``.

    model: as ``load_model`` takes it; None: not known. FileNotFoundError or CorruptCalibration for
    no whole file of ours, and for a folder where no format is static; FormatError for a static
    format without scales. What only weights can refuse is left to ``find_key_maps``.
    """
    given = None if given == NONE else given
    formats = LayerFormats.of(kv_format)
    static = next((each for each in formats.formats if not each.dynamic), None)
    if static is None:
        if given not in (None, AUTO):
            Calibration.load(given)
    elif given is None:
        raise _no_scales(static, given)
    elif given != AUTO and not _is_folder(given):
        Calibration.load(given)
    elif model is not None:
        config = load_config(model)
        of_layers = formats.of_layers(len(reaches_of(config)))
        folder, gguf = find_files(model, weights=False)
        _of_checkpoint(config, of_layers, given, None if gguf else folder)


def find_key_maps(
    model: PreTrainedModel,
    formats: Sequence[KVFormat],
    calibration: str | Path | None,
    latent: Collection[int] = (),
) -> KeyMaps:
    """The maps for a format a layer.

    calibration: AUTO, NONE or None, or a file of `quantpage calibrate`. latent: layers whose keys
    are not what is cached, and that the weights ask for no map of.
    """
    if not isinstance(calibration, str | Path | None):
        raise ValueError(f"calibration: expected 'auto', 'none' or a path, got {calibration!r}")
    calibration = None if calibration == NONE else calibration
    static = next((each for each in formats if not each.dynamic), None)
    of_checkpoint = calibration == AUTO or _is_folder(calibration)
    if static is not None and calibration is not None and of_checkpoint:
        found = _of_checkpoint(model.config, formats, calibration, model.name_or_path)
        assert found.static is not None
        return replace(found, static=found.static.to(device_of(model)))
    if calibration is None:
        if static is not None:
            raise _no_scales(static, calibration)
        return KeyMaps("none")
    if calibration != AUTO:
        return _of_file(model, formats, calibration)
    mapped = {i for i, each in enumerate(formats) if each.key.quantized}
    if not mapped:
        return KeyMaps("none: keys are not quantized")
    mapped -= set(latent)
    if not mapped or not (has_key_biases(model) or has_uneven_key_norms(model)):
        return KeyMaps("none: keys have neither biases nor norms with uneven gains")
    layers = _of_weights(model, formats, mapped)
    if not layers:
        warnings.warn(
            f"{type(model).__name__}: its keys have biases or norms with uneven gains, which "
            "quantization does badly with, and it computes attention by itself, so that they "
            "cannot be measured and taken out; "
            "compare answers with kv_format='none'",
            stacklevel=3,
        )
        return KeyMaps("none: attention cannot be measured")
    return KeyMaps("the weights (random tokens)", layers)


def _no_scales(static: KVFormat, calibration: str | Path | None) -> FormatError:
    return FormatError(
        f"calibration: expected a file with static scales for {static.name} (quantpage calibrate "
        f"--kv-format {static.name}), or a checkpoint's folder that holds them, got "
        f"{calibration if calibration is None else str(calibration)!r}"
    )


def _is_folder(calibration: str | Path | None) -> bool:
    return calibration is not None and Path(calibration).is_dir()


def _of_checkpoint(
    config: PreTrainedConfig,
    formats: Sequence[KVFormat],
    given: str | Path,
    loaded: str | Path | None,
) -> KeyMaps:
    """Static scales out of a checkpoint's own files; loaded: where the model is from, for AUTO."""
    folder = loaded if given == AUTO else given
    static = next(each for each in formats if not each.dynamic)
    if not folder or not Path(folder).is_dir():
        raise _no_scales(static, given)
    names = sorted({each.name for each in formats if not each.dynamic})
    if len(names) > 1:
        raise FormatError(
            f"kv_format: expected one static format in all layers, got {', '.join(names)}"
        )
    shape = model_shape(config)
    found = read_checkpoint_scales(Path(folder), formats, shape.kv_heads, shape.head_dim)
    if found is None:
        raise _no_scales(static, given)
    return KeyMaps(f"scales of {Path(folder).name}", {}, found)


def _of_file(model: PreTrainedModel, formats: Sequence[KVFormat], path: str | Path) -> KeyMaps:
    found = Calibration.load(path)
    found.check(model, path)
    softcapped = not takes_means(model)
    for index, each in found.layers.items():
        if index >= len(formats) or (softcapped and each.key_map.mean is not None):
            raise CorruptCalibration(f"{path}: expected one of this model, got layer {index} of it")
    layers = found.maps(formats, path)
    static = found.scales(formats, path)
    device = device_of(model)
    return KeyMaps(Path(path).name, layers, None if static is None else static.to(device))


@dataclass(slots=True)
class _Weights:
    """What was measured of a model's weights, and the maps that were made of it."""

    state: object
    found: dict[int, KeyStatistics]
    made: dict[tuple[int, KVFormat], LayerCalibration] = field(default_factory=dict)


_measured: WeakKeyDictionary[nn.Module, _Weights] = WeakKeyDictionary()


def _of_weights(
    model: PreTrainedModel, formats: Sequence[KVFormat], mapped: set[int]
) -> dict[int, KeyMap]:
    """Measured and made once for as long as the weights are the same."""
    state = [(each.data_ptr(), each._version) for each in model.parameters()]
    known = _measured.get(model)
    if known is None or known.state != state:
        known = _measured[model] = _Weights(state, measure_random(model))
    missing = {
        index: each
        for index, each in known.found.items()
        if index in mapped and (index, formats[index]) not in known.made
    }
    for index, each in layers_of_weights(missing, formats, takes_means(model)).items():
        known.made[index, formats[index]] = each
    layers = {}
    for index in sorted(mapped & known.found.keys()):
        made = known.made[index, formats[index]].for_codes(formats[index])
        if made is not None:
            layers[index] = made
    return layers
