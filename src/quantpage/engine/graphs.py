"""Decode steps as CUDA graphs: the model's step of so many answers, captured once and replayed.

What differs from step to step lies in tensors that every graph reads: tokens, context lengths and
page tables. Positions and slots are worked out inside it, and the logits are the only result. A
graph serves steps of fewer answers too, whose missing rows have contexts of no tokens, and contexts
up to a bound, which chooses no more than the shape of attention's launches.
"""

import warnings
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from functools import partial

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, plan_on_device
from quantpage.cache import Reach
from quantpage.cuda_graphs import GraphPool
from quantpage.integrations.hf_transformers.pages.memory import Shelf
from quantpage.integrations.hf_transformers.pages.step import Tables

Forward = Callable[[Tensor, Tensor, dict[Reach, BatchPlan]], Tensor]
"""Tokens and positions [answers] int64, the plan of each reach -> logits [answers, vocabulary]."""

_FIRST_BOUND, _NEXT_BOUND = 1024, 4
"""Tokens of the shortest bound, and how much longer the next one is."""


class _Tables:
    """The page tables of one reach, where graphs read them."""

    def __init__(self, shelf: Shelf, answers: int, columns: int) -> None:
        def table() -> Tensor:
            shape, device = (answers, columns), shelf.store.device
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.pages = table()
        self.exact = None if shelf.exact_pool is None else table()
        self._written: tuple[list[list[int]], list[list[int]]] = ([], [])

    def write(self, given: Tables) -> None:
        """What differs from the step before, whole tables."""
        pages, near, _ = given
        for which, (table, rows) in enumerate(((self.pages, pages), (self.exact, near))):
            if table is None or self._written[which] == rows:
                continue
            widest = max(map(len, rows))
            filled = [[*row, *[-1] * (widest - len(row))] for row in rows]
            table[: len(rows), :widest].copy_(torch.tensor(filled, dtype=torch.int32, device="cpu"))
            self._written[which][:] = [[*row] for row in rows]


class DecodeGraphs:
    """Graphs of one model over pages that do not move; for one thread."""

    def __init__(
        self, forward: Forward, shelves: Mapping[Reach, Shelf], answers: int, longest: int
    ) -> None:
        """answers: that share a step at most. longest: tokens of a context at most."""
        self._forward, self._answers = forward, answers
        self._page_size = next(iter(shelves.values())).page_size
        device = next(iter(shelves.values())).store.device
        self._longest = longest
        columns = -(-longest // self._page_size)
        self._tables = {reach: _Tables(each, answers, columns) for reach, each in shelves.items()}
        self._numbers = torch.zeros(2, answers, dtype=torch.int64, device=device)
        """Tokens, and context lengths with them."""
        self._starts = torch.arange(answers + 1, dtype=torch.int32, device=device)
        self._made: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = GraphPool(device)
        self.replays = 0
        """Steps so far."""

    def run(
        self, tokens: Listed[int], contexts: Listed[int], tables: Mapping[Reach, Tables]
    ) -> Tensor | None:
        """[answers, vocabulary] logits, overwritten by the next step.

        tokens: the next of each answer. contexts: tokens of each with it. None where the step
        cannot be a graph: the first that fails is said in a warning, and is the last.
        """
        if self._answers == 0:
            return None
        count = len(tokens)
        numbers = torch.zeros(2, self._answers, dtype=torch.int64, device="cpu")
        numbers[:, :count] = torch.tensor([tokens, contexts], device="cpu")
        self._numbers.copy_(numbers)
        for reach, given in tables.items():
            self._tables[reach].write(given)
        shape = self._shape(count, max(contexts))
        if shape not in self._made:
            try:
                self._made[shape] = self._pool.capture(partial(self._step, *shape))
            except RuntimeError as error:
                self._answers = 0
                warnings.warn(
                    f"decode steps are no CUDA graphs, as one could not be captured: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
        graph, logits = self._made[shape]
        graph.replay()
        self.replays += 1
        return logits[:count]

    def _shape(self, count: int, context: int) -> tuple[int, int]:
        """Rows and longest context of the graph that serves a step."""
        rows = min(1 << (count - 1).bit_length(), self._answers)
        bound = _FIRST_BOUND
        while bound < context:
            bound *= _NEXT_BOUND
        return rows, min(bound, self._longest)

    def _step(self, rows: int, bound: int) -> Tensor:
        tokens, contexts = self._numbers[:, :rows]
        contexts = contexts.to(torch.int32)
        columns = -(-bound // self._page_size)

        def plan(tables: _Tables) -> BatchPlan:
            pages, exact = (
                None if each is None else each[:rows, :columns].contiguous()
                for each in (tables.pages, tables.exact)
            )
            assert pages is not None
            return plan_on_device(
                self._starts[: rows + 1], contexts, pages, self._page_size, (1,) * rows, bound,
                exact,
            )  # fmt: skip

        plans = {reach: plan(each) for reach, each in self._tables.items()}
        # Rows without an answer are at -1, which no table of a model knows.
        positions = next(iter(plans.values())).positions.clamp_min(0)
        return self._forward(tokens, positions, plans)
