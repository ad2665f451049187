"""Which key maps an attached model gets: none, those of a file, or those its weights ask for."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from quantpage.formats import KeyMap, KVFormat
from quantpage.formats.key_statistics import KeyStatistics
from quantpage.integrations.hf_transformers.model import text_config
from quantpage.integrations.hf_transformers.statistics import has_key_biases, measure_random

AUTO = "auto"
"""Key maps from the weights, where a model's keys have biases."""


@dataclass(frozen=True, slots=True)
class KeyMaps:
    """The maps of an attachment, and where they come from."""

    source: str
    """In words, for reports."""
    layers: Mapping[int, KeyMap] = field(default_factory=dict)
    """By layer; a layer without one caches keys as they are."""


def find_key_maps(
    model: PreTrainedModel, formats: Sequence[KVFormat], calibration: str | Path | None
) -> KeyMaps:
    """The maps for a format a layer.

    calibration: AUTO, None for none, or a file of `quantpage calibrate`.
    """
    if calibration is None:
        return KeyMaps("none")
    if calibration != AUTO:
        raise ValueError(f"calibration: expected 'auto' or None, got {str(calibration)!r}")
    if not any(each.key.quantized for each in formats):
        return KeyMaps("none: keys are not quantized")
    if not has_key_biases(model):
        return KeyMaps("none: keys have no bias")
    found = _of_weights(model)
    mean = getattr(text_config(model.config), "attn_logit_softcapping", None) is None
    layers = {
        index: statistics.key_map(mean)
        for index, statistics in found.items()
        if index < len(formats) and formats[index].key.quantized
    }
    if not layers:
        warnings.warn(
            f"{type(model).__name__}: its keys have biases, which quantization does badly with, "
            "and it computes attention by itself, so that they cannot be measured and taken out; "
            "compare answers with kv_format='none'",
            stacklevel=3,
        )
        return KeyMaps("none: attention cannot be measured")
    return KeyMaps("the weights (random tokens)", layers)


_measured: WeakKeyDictionary[nn.Module, tuple[object, dict[int, KeyStatistics]]]
_measured = WeakKeyDictionary()


def _of_weights(model: PreTrainedModel) -> dict[int, KeyStatistics]:
    """Measured once for as long as the weights are the same."""
    state = [(each.data_ptr(), each._version) for each in model.parameters()]
    known = _measured.get(model)
    if known is None or known[0] != state:
        known = _measured[model] = (state, measure_random(model))
    return known[1]
