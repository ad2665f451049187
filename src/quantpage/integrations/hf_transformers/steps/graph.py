"""Decode as one CUDA graph: a captured step of the whole model, replayed once a token.

Everything that changes from step to step (positions, context lengths, slots, the token itself) is a
tensor that the graph advances on the device, so that a replay needs nothing from the host.
Pages for all new tokens are reserved before the capture; host integers are upper bounds.
"""

from typing import Any

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cuda_graphs import GraphPool
from quantpage.errors import CacheError, UnsupportedModel
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.pages.step import Part, Step


class DecodeGraph:
    """Greedy decode of an attached model over a cache that holds a prompt.

    ``DecodeGraph(model, cache, last_tokens, max_new_tokens).run(n)`` returns [rows, n] tokens.
    Rows must have no padding. Raises UnsupportedModel for layers with another state than pages:
    a capture runs the step several times, and only pages are rewound.
    """

    def __init__(
        self, model: Any, cache: QuantPageCache, last_tokens: Tensor, max_new_tokens: int
    ) -> None:
        for index, layer in cache.stateful().items():
            raise UnsupportedModel(
                f"layer {index}: expected keys and values in pages as the only state, got "
                f"{type(layer).__name__}"
            )
        if not last_tokens.is_cuda:
            raise ValueError(f"last_tokens: expected a CUDA tensor, got {last_tokens.device}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        self._model, self._cache = model, cache
        self._left = max_new_tokens
        self._start = cache.get_seq_length()
        self._plans = cache.rows.reserve_ahead(max_new_tokens)
        self._token = last_tokens.reshape(-1, 1).clone()
        self._position = next(iter(self._plans.values())).positions.clone()
        self._pages = cache.rows.memory.size
        self._graph = self._captured()

    @torch.inference_mode()
    def run(self, tokens: int) -> Tensor:
        """Replay ``tokens`` steps; [rows, tokens]. Nothing is read back from the device."""
        if not 0 < tokens <= self._left:
            raise ValueError(f"tokens: expected 1..{self._left}, got {tokens}")
        if self._cache.rows.memory.size != self._pages:
            raise CacheError("run: its pages moved when another cache in their memory grew")
        made = []
        for _ in range(tokens):
            self._graph.replay()
            made.append(self._token.clone())
        self._left -= tokens
        self._start += tokens
        return torch.cat(made, dim=1)

    @torch.inference_mode()
    def _captured(self) -> torch.cuda.CUDAGraph:
        rows = self._cache.rows
        parts = {reach: Part(plan) for reach, plan in self._plans.items()}
        rows.frozen = Step(self._start, 1, rows.count, parts, None)
        before = [each.clone() for each in self._moving()]
        try:
            pool = GraphPool(self._token.device)
            graph, _ = pool.capture(self._step, undo=lambda: self._rewind(before))
        finally:
            rows.frozen = None
            self._rewind(before)
        return graph

    def _step(self) -> None:
        """One token: the model, the most likely token, and everything moved on by one."""
        out = self._model(
            input_ids=self._token,
            position_ids=self._position.view(-1, 1),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache.set_length(self._start)
        self._token.copy_(out.logits[:, -1:].argmax(-1))
        self._position += 1
        for plan in self._plans.values():
            plan.positions.add_(1)
            plan.context_lens.add_(1)
            _advance(plan.slots, plan.page_table, plan)
            if plan.exact is not None:
                _advance(plan.exact.slots, plan.exact.page_table, plan)

    def _moving(self) -> list[Tensor]:
        moving = [self._token, self._position]
        for plan in self._plans.values():
            moving += [plan.positions, plan.context_lens, plan.slots]
            moving += [] if plan.exact is None else [plan.exact.slots]
        return moving

    def _rewind(self, before: list[Tensor]) -> None:
        for tensor, old in zip(self._moving(), before, strict=True):
            tensor.copy_(old)


def _advance(slots: Tensor, table: Tensor, plan: BatchPlan) -> None:
    """Slots of the next position; one past the last page stays on it and is never written."""
    page_of = (plan.positions // plan.page_size).clamp_max(table.shape[1] - 1)
    pages = table.gather(1, page_of[:, None]).flatten().to(torch.int64)
    slots.copy_(pages * plan.page_size + plan.positions % plan.page_size)
