"""One step of a model: the new tokens of many requests in one row, over pages that we place.

The model is Transformers' own, attached. It sees a batch of one row, [1, tokens]; attention reads
from the step's ``BatchPlan`` which token belongs to which request.
"""

import inspect
from collections.abc import Sequence as Listed
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, plan_batch
from quantpage.cache import PageCopy, Reach
from quantpage.engine.graphs import DecodeGraphs
from quantpage.engine.request import Request
from quantpage.engine.scheduler import Chunk, Limits
from quantpage.engine.sizes import EXACT_AN_ANSWER, pool_pages
from quantpage.errors import UnsupportedModel
from quantpage.integrations.hf_transformers.attach import Attached
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.cache.paged_layer import PagedLayer
from quantpage.integrations.hf_transformers.loading.model import device_of, text_config
from quantpage.integrations.hf_transformers.modules.arguments import cache_as, parameters
from quantpage.integrations.hf_transformers.modules.coverage import refuse_look_ahead
from quantpage.integrations.hf_transformers.modules.digest import model_digest
from quantpage.integrations.hf_transformers.pages.step import Part, Step, plan_part, tables_of
from quantpage.warm_up import Asked, Sizes, WarmUp, warm_up

_MOVING_ROTATION = ("dynamic", "longrope")
"""Rotations that change with the longest request of a step."""
_LOGITS = 1 << 26
"""Of tokens of prompts, in the model's dtype, that a step may keep: 128 MiB in 16 bits."""
_ALIKE = 0.02
"""Of the logits' spread: what sums in another order may change, on a GPU in 16 bits."""


class StepRunner:
    """An attached model over a fixed number of pages."""

    def __init__(self, attached: Attached, limits: Limits, cuda_graphs: bool = True) -> None:
        _refuse_counted(attached)
        refuse_look_ahead(attached.model)
        self._attached, self._model = attached, attached.model
        self._cache = attached.new_cache()
        self.memory, self.page_size = self._cache.rows.memory, self._cache.rows.page_size
        self.device = device_of(self._model)
        self._digest: str | None = None
        self._planned: dict[Reach, Part] = {}
        """The newest step, from which the next may follow."""
        self._lay_out()
        for shelf in self.memory.shelves.values():
            exact = 0 if shelf.exact_pool is None else EXACT_AN_ANSWER * limits.max_running
            pages = pool_pages(shelf.reach, limits, self.page_size)
            self.memory.make_room(shelf, pages, exact)
        self.longest = _longest(self._model, limits, self.page_size)
        """Tokens of a prompt and its answer."""
        self.most_scored = max(1, _LOGITS // text_config(self._model.config).vocab_size)
        """Tokens of prompts whose logits a step may keep."""
        self.graphs: DecodeGraphs | None = None
        # A check reads back from the device, and a mask of one's own may.
        still = not attached.options.checked and attached.options.mask is None
        if cuda_graphs and still and self.device.type == "cuda":
            self.graphs = DecodeGraphs(
                self._decode, self.memory.shelves, limits.max_running, self.longest
            )

    @torch.inference_mode()
    def run(self, chunks: Listed[Chunk], copies: list[tuple[Reach, PageCopy]]) -> Tensor:
        """Logits after the last tokens of each chunk, as many as it keeps, one chunk's after the
        other's [kept, vocabulary]; pages are written."""
        for reach, copy in copies:
            self.memory.shelves[reach].store.copy_pages([copy])
        logits = self._replayed(chunks)
        return self._eager(chunks) if logits is None else logits

    def _replayed(self, chunks: Listed[Chunk]) -> Tensor | None:
        """A step in which every answer brings one token, as a CUDA graph; None where it is none."""
        if self.graphs is None or any(chunk.tokens != 1 for chunk in chunks):
            return None
        answers = [chunk.answer for chunk in chunks]
        holdings = [each.holding for each in answers if each.holding is not None]
        contexts = [each.cached_length + 1 for each in answers]
        return self.graphs.run(
            [each.tokens[at - 1] for each, at in zip(answers, contexts, strict=True)],
            contexts,
            {
                reach: tables_of([each.tables[reach] for each in holdings], shelf, None)
                for reach, shelf in self.memory.shelves.items()
            },
        )

    def _eager(self, chunks: Listed[Chunk]) -> Tensor:
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
        kept = (plan.query_starts[1:] - 1).to(torch.int64)
        if any(chunk.kept > 1 for chunk in chunks):
            ends = zip(accumulate(new), chunks, strict=True)
            rows = [row for end, chunk in ends for row in range(end - chunk.kept, end)]
            kept = torch.tensor(rows, device=self.device)
        return self._forward(torch.tensor(tokens, device=self.device), plan.positions, parts, kept)

    def _decode(self, tokens: Tensor, positions: Tensor, plans: dict[Reach, BatchPlan]) -> Tensor:
        return self._forward(tokens, positions, {at: Part(each) for at, each in plans.items()}, 0)

    def _forward(
        self, tokens: Tensor, positions: Tensor, parts: dict[Reach, Part], kept: Tensor | int
    ) -> Tensor:
        """Logits of the tokens that ``kept`` names; 0: of all."""
        rows = self._cache.rows
        rows.frozen = Step(0, len(tokens), 1, parts, None)
        try:
            out = self._model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=True,
                logits_to_keep=kept,
                **cache_as(self._model, self._cache),
            )
        finally:
            rows.frozen = None
            self._cache.set_length(0)
        logits: Tensor = out.logits[0]
        if isinstance(kept, Tensor) and len(logits) != len(kept):
            # Not every class knows ``logits_to_keep``: the others give all.
            return logits[kept]
        return logits

    def refuse(self, request: Request) -> None:
        """Raise ValueError for tokens that the model has not, and for more than it has places for:
        behind them some models fail, and graphs see no further."""
        together = len(request.prompt) + request.max_tokens
        if together > self.longest:
            raise ValueError(
                f"max_tokens: expected at most {self.longest} tokens together, got a prompt of "
                f"{len(request.prompt)} and {request.max_tokens} more"
            )
        count = text_config(self._model.config).vocab_size
        biased = [token for token, _ in request.sampling.logit_bias]
        for name, tokens in (("prompt", request.prompt), ("logit_bias", biased)):
            if tokens and not 0 <= min(tokens) <= max(tokens) < count:
                wrong = next(each for each in tokens if not 0 <= each < count)
                raise ValueError(f"{name}: expected tokens below {count}, got {wrong}")

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
        """Heads and channels are known after the first forward, and what a step cannot have.

        Raises UnsupportedModel for that, and where a first token's position is not 0, as steps say
        it is.
        """
        own = self._logits([0], told=False)
        _refuse_layers(self._attached, self._cache)
        if (own - self._logits([0])).abs().max() > _ALIKE * own.std():
            raise UnsupportedModel(
                f"{type(self._model).__name__}: the engine expects a first token at position 0, "
                "and its own code places it elsewhere"
            )
        if "position_ids" not in parameters(self._model) and torch.equal(
            self._logits([0, 1]), self._logits([0, 2])
        ):
            # Taken among others, and not handed on.
            raise _counts_positions(self._model)

    def _logits(self, positions: list[int], told: bool = True) -> Tensor:
        """[vocabulary] after tokens that are no padding, which has a position of its own.

        told: whether the model is told the positions.
        """
        token = text_config(self._model.config).vocab_size // 2
        given = torch.tensor([positions], device=self.device)
        out = self._model(
            input_ids=torch.full_like(given, token),
            use_cache=True,
            **({"position_ids": given} if told else {}),
            **cache_as(self._model, self._cache),
        )
        self._cache.rows.clear()
        self._cache.set_length(0)
        logits: Tensor = out.logits[0, -1].float()
        return logits


def compile_steps(attached: Attached, limits: Limits) -> None:
    """Compile what a runner's steps will ask for, before there is one; nothing on a CPU, and of a
    model on several devices."""
    places = {each.device for each in attached.model.parameters()}
    if len(places) == 1 and next(iter(places)).type == "cuda":
        with warm_up(*places) as warm:
            ask_layers(warm, attached, limits)


@torch.inference_mode()
def ask_layers(warm: WarmUp, attached: Attached, limits: Limits) -> None:
    """Of every layer what steps will ask of it, over pages of its own.

    The forward that tells which layers read pages launches nothing on a GPU either: nobody reads
    what it says.
    """
    model, cache, device = attached.model, attached.new_cache(), warm.device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model(input_ids=token, use_cache=True, **cache_as(model, cache))
    memory = cache.rows.memory
    longest = _longest(model, limits, memory.page_size)
    sizes = Sizes(limits.max_running, min(limits.step_tokens, longest), longest)
    like = plan_batch([1], [1], [[0]], memory.page_size, device)
    for layer in cache.layers:
        if not isinstance(layer, PagedLayer) or layer.served is None:
            continue
        attention, params = layer.served
        # Any other mask knows how long requests are.
        if params.mask.kind in ("causal", "full"):
            warm.ask(Asked(attention, memory.layer(layer.index), params, like), sizes)


def _longest(model: Any, limits: Limits, page_size: int) -> int:
    """Tokens of the longest context that pages and the model's positions have room for."""
    known = getattr(text_config(model.config), "max_position_embeddings", None)
    held = limits.pages * page_size
    return min(held, known) if isinstance(known, int) and known > 0 else held


def _refuse_counted(attached: Attached) -> None:
    """Raise UnsupportedModel where requests cannot share a row, as where a token stands depends on
    the row."""
    name = type(attached.model).__name__
    if not _is_told_positions(attached.model):
        raise _counts_positions(attached.model)
    if any(reach.chunk for reach in attached.new_cache().rows.memory.shelves):
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


def _counts_positions(model: Any) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__}: the engine expects a forward that is told positions, as requests "
        "share a row, and its own counts them"
    )


def _is_told_positions(model: Any) -> bool:
    """Whether a forward takes positions, or hands them on to a body that does (Evolla)."""
    if "position_ids" in parameters(model):
        return True
    kinds = inspect.signature(type(model).forward).parameters.values()
    hands_on = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in kinds)
    return hands_on and "position_ids" in parameters(model.base_model)


def _refuse_layers(attached: Attached, cache: QuantPageCache) -> None:
    """Raise UnsupportedModel for layers with state beside pages, which requests would share, and
    for those that made their pages dense: a step's are many requests'.

    After a forward, which tells of both.
    """
    name = type(attached.model).__name__
    others = {type(each).__name__ for each in cache.stateful().values()}
    if others:
        raise UnsupportedModel(
            f"{name}: the engine expects keys and values as the only state, "
            f"got layers of {', '.join(sorted(others))}"
        )
    for why, layers in attached.coverage.dense:
        raise UnsupportedModel(
            f"{name}: the engine expects layers that read pages, got {layers} that attend densely "
            f"because {why}"
        )
