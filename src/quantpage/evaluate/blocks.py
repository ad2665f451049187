"""Predictions with one layer's attention in pages: what lies below that layer is as it was.

A decoder that runs its blocks one after the other (Llama and its likes, most of what is measured)
computes the same below the changed layer every time: half of the work of measuring each layer
alone. What went into every block is kept of the unquantized forward, and a forward with one layer
changed begins there. All tokens go through in one step, as results do not depend on the cut.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.evaluate.caches import unquantized
from quantpage.evaluate.score import Attaching, Window, log_probabilities
from quantpage.integrations.hf_transformers.keys.watch import Attend, watched
from quantpage.integrations.hf_transformers.modules.llama_like import is_llama_model

Predictions = Float[Tensor, "scored vocabulary"]


@dataclass(frozen=True, slots=True)
class Unquantized:
    """One window without a quantized cache."""

    window: Window
    predictions: Predictions
    """Log-probabilities of the scored tokens."""
    inputs: tuple[Tensor, ...]
    """Of each block; empty for a model that is more than its blocks in a row."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, window: Window) -> "Unquantized":
        """model: loaded, not attached."""
        if not _in_a_row(model):
            # All scored tokens in one step: what a cache says does not depend on the cut.
            with unquantized(model) as new_cache:
                found = log_probabilities(model, window, new_cache, window.scored)
            return cls(window, found, ())
        inputs: list[Tensor] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
            for block in model.base_model.layers
        ]
        try:
            found = _forward(model, window)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(window, found, tuple(inputs))

    @torch.inference_mode()
    def changed(self, model: Any, layer: int, attaching: Attaching) -> Predictions:
        """With this layer in the pages of a cache that quantizes no other. model: not attached."""
        with attaching(model) as new_cache:
            if not self.inputs:
                return log_probabilities(model, self.window, new_cache, self.window.scored)
            paged: Any = new_cache().layers[layer]

        def look(index: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Any:
            return attend(*paged.update(key, value)) if index == layer else None

        with watched(model, look), _entered(model, layer, self.inputs[layer]):
            return _forward(model, self.window)


def _in_a_row(model: Any) -> bool:
    decoder = model.base_model
    # Somebody else's forward (accelerate moves weights in it) is not passed over.
    return is_llama_model(decoder) and not any("forward" in vars(each) for each in decoder.layers)


def _forward(model: Any, window: Window) -> Predictions:
    # The last token predicts nothing scored.
    tokens = window.tokens[:, :-1].to(model.device)
    out = model(tokens, use_cache=False, logits_to_keep=window.scored)
    return out.logits[0].float().log_softmax(-1)


@contextmanager
def _entered(model: Any, layer: int, x: Tensor) -> Iterator[None]:
    """The decoder begins at a block, into which ``x`` goes."""
    below = model.base_model.layers[:layer]
    try:
        for block in below:
            block.forward = lambda *_, **__: x
        yield
    finally:
        for block in below:
            vars(block).pop("forward", None)
