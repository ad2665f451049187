"""A model's modules without storage, made of its configuration alone.

What ``attach`` asks of a model before it takes it can so be asked where no weights are.
"""

from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from quantpage.errors import UnsupportedModel
from quantpage.integrations.hf_transformers.loading.checkpoint import errors_in_one_sentence
from quantpage.integrations.hf_transformers.loading.model import text_config


def decoder_of(config: Any) -> nn.Module | None:
    """The modules of a configuration's decoder, with as few others as there is a class for.

    None for a configuration that is not Transformers' own. Raises UnsupportedModel where
    Transformers has no model of it.
    """
    # A decoder's part of a configuration is not always one of a class.
    return _built_of(text_config(config), config)


def loaded_of(config: Any) -> nn.Module | None:
    """The modules that ``load_model`` loads, pictures' too; else as ``decoder_of``."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        # It knows which classes want the decoder's part of a configuration alone.
        return _built(AutoModelForCausalLM, config)
    return _built_of(config)


def _built_of(*configs: Any) -> nn.Module | None:
    """Of the first that there is a class for."""
    for config in configs:
        if not type(config).__module__.startswith("transformers."):
            return None
        kind = _class_of(config)
        if kind is not None:
            return _built(kind, config)
    raise UnsupportedModel(
        f"{configs[-1].model_type}: expected a decoder, and Transformers has no model of this kind"
    )


def _built(kind: Any, config: Any) -> nn.Module:
    build = getattr(kind, "from_config", None) or kind._from_config
    with torch.device("meta"), errors_in_one_sentence(config.model_type):
        # A copy: Transformers writes its choice of dtype and attention into it.
        return build(deepcopy(config), attn_implementation="eager")


def _class_of(config: Any) -> Any:
    """Transformers' class for a configuration; None: there is none."""
    kind = type(config)
    for known in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if kind in known:
            return known[kind]
    # Parts of models are in no table.
    try:
        beside = vars(import_module(kind.__module__.replace(".configuration_", ".modeling_")))
    except ModuleNotFoundError:
        return None
    found = [
        each
        for each in beside.values()
        if isinstance(each, type)
        and issubclass(each, PreTrainedModel)
        and each.config_class is kind
    ]
    # Those that generate first, then those that stand last, which are made of the others.
    return max(found, key=lambda each: (each.can_generate(), found.index(each)), default=None)
