"""One step of a model: the new tokens of many requests in one row, over pages that we place.

The model is Transformers' own, attached. It sees a batch of one row, [1, tokens]; attention reads
from the step's ``BatchPlan`` which token belongs to which request.
"""

from collections.abc import Sequence as Listed

import torch
from torch import Tensor

from quantpage.cache import PageCopy, Reach
from quantpage.engine.scheduler import Chunk, Limits
from quantpage.engine.sizes import EXACT_AN_ANSWER, pool_pages
from quantpage.errors import UnsupportedModel
from quantpage.integrations.hf_transformers.arguments import cache_as
from quantpage.integrations.hf_transformers.attach import Attached
from quantpage.integrations.hf_transformers.digest import model_digest
from quantpage.integrations.hf_transformers.model import text_config
from quantpage.integrations.hf_transformers.paged_layer import PagedLayer
from quantpage.integrations.hf_transformers.step import Part, Step, plan_part

_MOVING_ROTATION = ("dynamic", "longrope")
"""Rotations that change with the longest request of a step."""


class StepRunner:
    """An attached model over a fixed number of pages."""

    def __init__(self, attached: Attached, limits: Limits) -> None:
        _refuse(attached)
        self._attached, self._model = attached, attached.model
        self._cache = attached.new_cache()
        self.memory, self.page_size = self._cache.rows.memory, self._cache.rows.page_size
        self.device = next(self._model.parameters()).device
        self._digest: str | None = None
        self._planned: dict[Reach, Part] = {}
        """The newest step, from which the next may follow."""
        self._lay_out()
        for shelf in self.memory.shelves.values():
            exact = 0 if shelf.exact_pool is None else EXACT_AN_ANSWER * limits.max_running
            pages = pool_pages(shelf.reach, limits, self.page_size)
            self.memory.make_room(shelf, pages, exact)

    @torch.inference_mode()
    def run(self, chunks: Listed[Chunk], copies: list[tuple[Reach, PageCopy]]) -> Tensor:
        """[chunks, vocabulary] logits after the last token of each chunk; pages are written."""
        for reach, copy in copies:
            self.memory.shelves[reach].store.copy_pages([copy])
        holdings = [chunk.answer.holding for chunk in chunks]
        new = [chunk.tokens for chunk in chunks]
        parts = self._planned = {
            reach: plan_part(
                [each.tables[reach] for each in holdings if each],
                shelf,
                new,
                self._planned.get(reach),
            )
            for reach, shelf in self.memory.shelves.items()
        }
        plan = next(iter(parts.values())).batch
        tokens = [
            token
            for chunk in chunks
            for token in chunk.answer.tokens[chunk.answer.cached_length :][: chunk.tokens]
        ]
        rows = self._cache.rows
        rows.frozen = Step(0, len(tokens), 1, parts, None)
        try:
            out = self._model(
                input_ids=torch.tensor([tokens], device=self.device),
                position_ids=plan.positions[None],
                use_cache=True,
                logits_to_keep=(plan.query_starts[1:] - 1).to(torch.int64),
                **cache_as(self._model, self._cache),
            )
        finally:
            rows.frozen = None
            self._cache.set_length(0)
        return out.logits[0]

    def digest(self) -> str:
        """Of what keys and values depend on besides tokens and formats; reads every weight once."""
        if self._digest is None:
            self._digest = model_digest(self._model, self._attached.options.mask)
        return self._digest

    def reset(self) -> None:
        """After a step that failed: layers that keep nothing of it, over the same pages."""
        self._cache = self._attached.new_cache(self.memory)

    @torch.inference_mode()
    def _lay_out(self) -> None:
        """Heads and channels are known after the first forward."""
        self._model(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device),
            use_cache=True,
            **cache_as(self._model, self._cache),
        )
        self._cache.rows.clear()
        self._cache.set_length(0)


def _refuse(attached: Attached) -> None:
    """Raise UnsupportedModel where requests cannot share a row, or have state beside pages."""
    name = type(attached.model).__name__
    cache = attached.new_cache()
    others = {type(each).__name__ for each in cache.layers if not isinstance(each, PagedLayer)}
    if others:
        raise UnsupportedModel(
            f"{name}: the engine expects keys and values as the only state, "
            f"got layers of {', '.join(sorted(others))}"
        )
    if any(reach.chunk for reach in cache.rows.memory.shelves):
        raise UnsupportedModel(
            f"{name}: the engine expects attention to all tokens or in windows, got chunks"
        )
    rotation = getattr(text_config(attached.model.config), "rope_parameters", None) or {}
    kinds = [rotation, *(each for each in rotation.values() if isinstance(each, dict))]
    for each in kinds:
        if each.get("rope_type") in _MOVING_ROTATION:
            raise UnsupportedModel(
                f"{name}: its rotation ({each['rope_type']}) depends on the longest request of a "
                "step, so that requests cannot share one"
            )
