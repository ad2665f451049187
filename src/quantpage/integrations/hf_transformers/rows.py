"""The rows of a batch: their page tables, and the step that is under way.

Every layer of a forward writes the same tokens, so that one step (pages reserved, padding left
out, one ``BatchPlan``) serves them all.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, ExactPlan, plan_batch
from quantpage.cache import CacheLayout, LayerKV, PagedKVCache, PagePool, Prefix, Sequence
from quantpage.errors import CacheError
from quantpage.integrations.hf_transformers.memory import Memory


@dataclass(frozen=True, slots=True)
class Step:
    """One forward's new tokens."""

    start: int
    """Tokens a row before it, padding included."""
    new: int
    batch: BatchPlan
    keep: Tensor | None
    """Indices of the tokens that are not padding among rows * new; None: all of them."""

    def pack(self, x: Tensor) -> Tensor:
        """[rows, heads, new, width] -> [tokens, heads, width] without padding."""
        # Of a single token as one operation: a decode step comes here three times a layer.
        flat = x.squeeze(2) if self.new == 1 else x.transpose(1, 2).flatten(0, 1)
        return flat if self.keep is None else flat[self.keep]

    def unpack(self, x: Tensor) -> Tensor:
        """[tokens, heads, width] -> [rows * new, heads, width], zeros for padding."""
        if self.keep is None:
            return x
        out = x.new_zeros(self.batch.num_requests * self.new, *x.shape[1:])
        out[self.keep] = x
        return out


class Rows:
    """The rows of a batch, in a memory that other caches may share."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.page_size = memory, memory.page_size
        self.sequences: list[Sequence] = []
        self._kept: Tensor | None = None
        """[rows, tokens] bool: False where a token was padding; None: never padding."""
        self._length = 0
        self._step: Step | None = None
        self.frozen: Step | None = None
        """The step of a CUDA graph under capture: every layer gets it, whatever it asks for."""

    @property
    def count(self) -> int:
        """Rows of the batch."""
        return len(self.sequences)

    def add_layer(self, index: int, layout: CacheLayout, like: Tensor) -> None:
        """Allocate a layer as soon as its keys are known; ``like`` is [rows, ...]."""
        self.memory.add_layer(index, layout, like.device)
        if not self.sequences:
            self.sequences = [self.memory.new_sequence() for _ in range(like.shape[0])]

    def layer(self, index: int) -> LayerKV:
        """The pages of one layer."""
        return self._store.layer(index)

    @property
    def _store(self) -> PagedKVCache:
        assert self.memory.store is not None
        return self.memory.store

    def step(self, start: int, new: int, padding: Tensor | None) -> Step:
        """The step that brings tokens ``start`` .. ``start + new`` of every row.

        Asked by each layer; the first to ask reserves the pages. padding: [rows, start + new]
        bool, False for padding.
        """
        if self.frozen is not None:
            return self.frozen
        if self._step is not None and (self._step.start, self._step.new) == (start, new):
            return self._step
        self.settle()
        if start != self._length:
            raise CacheError(
                f"step: expected it to start after {self._length} cached tokens, got {start}"
            )
        kept = self._kept_tokens(start, new, padding)
        lengths = [new] * self.count if kept is None else kept.sum(1).tolist()
        self._reserve(lengths)
        keep = None
        if kept is not None:
            keep = kept.flatten().nonzero().flatten().to(self._store.device)
        self._step = Step(start, new, self._plan(lengths), keep)
        return self._step

    def reserve_ahead(self, tokens: int) -> BatchPlan:
        """Pages for ``tokens`` more in every row, and the plan of the first of them.

        For CUDA graphs: the plan's host lengths are those of the last token, upper bounds for
        all. The tokens count as cached from then on.
        """
        self.settle()
        if self._kept is not None:
            raise CacheError("reserve_ahead: expected rows without padding, got padded rows")
        start = self._length
        self._reserve([tokens] * self.count)
        ahead = self._plan([tokens] * self.count)
        firsts = torch.arange(self.count) * tokens
        at = firsts.to(ahead.slots.device)
        exact = ahead.exact
        if exact is not None:
            exact = ExactPlan(exact.page_table, exact.slots[at].clone())
        self._step = Step(start, tokens, ahead, None)
        return BatchPlan(
            query_starts=torch.arange(self.count + 1, dtype=torch.int32, device=at.device),
            context_lens=torch.full_like(ahead.context_lens, start + 1),
            page_table=ahead.page_table,
            slots=ahead.slots[at].clone(),
            positions=ahead.positions[at].clone(),
            page_size=self.page_size,
            query_lens=(1,) * self.count,
            host_context_lens=ahead.host_context_lens,
            exact=exact,
        )

    def tables(self, length: int) -> Iterator[tuple[Tensor, int, Tensor]]:
        """For each row: its page table, its tokens, and their places among ``length``."""
        for row, sequence in enumerate(self.sequences):
            tokens = sequence.length + sequence.reserved
            if self._kept is None:
                places = torch.arange(length)
            else:
                places = self._kept[row, :length].nonzero().flatten()
            table = torch.tensor(sequence.pages, dtype=torch.int32)
            yield table.to(self._store.device), tokens, places.to(self._store.device)

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row ``rows[i]`` was; pages are shared, not copied."""
        self.settle()
        forked = [self.sequences[row].fork() for row in rows]
        for sequence in self.sequences:
            sequence.free()
        self.sequences = forked
        if self._kept is not None:
            self._kept = self._kept[rows]

    def fork(self) -> "Rows":
        """The same rows again, in the same memory; pages are shared, not copied."""
        self.settle()
        made = copy(self)
        made.sequences = [each.fork() for each in self.sequences]
        return made

    def adopt(self, prefix: Prefix) -> None:
        """Begin a single row with pages that another cache in this memory wrote."""
        sequence = self.memory.new_sequence()
        sequence.adopt(prefix)
        self.sequences, self._length = [sequence], sequence.length

    def save(self, path: Path | str, note: dict[str, Any]) -> None:
        """Write the rows and the pages that they hold to a file (cache/saved)."""
        self.settle()
        held = [
            sorted({page for each in self.sequences for page in getattr(each, name)} - {-1})
            for name in ("pages", "exact_pages")
        ]
        number, exact_number = ({page: at for at, page in enumerate(each)} for each in held)
        rows = [
            {
                "length": each.length,
                "pages": [number[page] for page in each.pages],
                "exact_pages": [exact_number.get(page, -1) for page in each.exact_pages],
            }
            for each in self.sequences
        ]
        kept = None if self._kept is None else self._kept.int().tolist()
        note = {**note, "length": self._length, "rows": rows, "kept": kept}
        self._store.save(path, held[0], held[1], note)

    @classmethod
    def of_saved(cls, memory: Memory, note: dict[str, Any]) -> "Rows":
        """The rows that ``save`` described, in a memory that holds their pages alone."""
        made = cls(memory)
        pools = [("pages", memory.pool), ("exact_pages", memory.exact_pool or PagePool(0))]
        made.sequences = [memory.new_sequence() for _ in note["rows"]]
        for name, pool in pools:
            # Every page of the file is held by some row: all are taken, shared, and let go once.
            held = [pool.acquire() for _ in range(pool.free)]
            for sequence, row in zip(made.sequences, note["rows"], strict=True):
                sequence.length = row["length"]
                pages = [page if page < 0 else pool.share(page) for page in row[name]]
                setattr(sequence, name, pages)
            for page in held:
                pool.release(page)
        if note["kept"] is not None:
            made._kept = torch.tensor(note["kept"], dtype=torch.bool)
        made._length = note["length"]
        return made

    def __del__(self) -> None:
        """Pages of a cache that nobody uses any more go back to a memory that others share."""
        for sequence in self.sequences:
            sequence.free()

    def crop(self, length: int) -> None:
        """Forget tokens from ``length`` (padding counted) on, in every row."""
        step, self._step = self._step, None
        for row, sequence in enumerate(self.sequences):
            tokens = length if self._kept is None else int(self._kept[row, :length].sum())
            if step is not None:
                # Never counted, so that a draft may be longer than the pages that are kept exact.
                sequence.commit(min(max(tokens - sequence.length, 0), sequence.reserved))
            sequence.crop(tokens)
        if self._kept is not None:
            self._kept = self._kept[:, :length]
        self._length = length

    def clear(self) -> None:
        """Forget every token; pages stay allocated for the next prompt."""
        for sequence in self.sequences:
            sequence.free()
        self._step, self._kept, self._length = None, None, 0

    def used_bytes(self) -> int:
        """Bytes of the pages that are held, by other caches in the same memory too."""
        return self.memory.used_bytes()

    def sixteen_bit_bytes(self) -> int:
        """What the tokens of all rows would take in 16 bits."""
        tokens = sum(each.length + each.reserved for each in self.sequences)
        return tokens * sum(
            2 * layout.kv_heads * (layout.head_dim + layout.v_dim)
            for layout in self.memory.layouts.values()
        )

    def settle(self) -> None:
        """Commit the step under way."""
        if self._step is None:
            return
        for sequence in self.sequences:
            sequence.commit()
        self._length = self._step.start + self._step.new
        self._step = None

    def _reserve(self, lengths: list[int]) -> None:
        needs = [
            sequence.pages_needed(tokens)
            for sequence, tokens in zip(self.sequences, lengths, strict=True)
        ]
        need, exact_need = (sum(column) for column in zip(*needs, strict=True))
        self.memory.make_room(need, exact_need)
        for sequence, tokens in zip(self.sequences, lengths, strict=True):
            self._store.copy_pages(sequence.reserve(tokens))

    def _plan(self, lengths: list[int]) -> BatchPlan:
        exact = self.memory.exact_pool is not None
        return plan_batch(
            lengths,
            [each.length + each.reserved for each in self.sequences],
            [each.pages for each in self.sequences],
            self.page_size,
            self._store.device,
            [each.exact_pages for each in self.sequences] if exact else None,
        )

    def _kept_tokens(self, start: int, new: int, padding: Tensor | None) -> Tensor | None:
        """[rows, new] bool of this step, remembered for the next; None: no padding at all."""
        if padding is None and self._kept is None:
            return None
        before = torch.ones(self.count, start, dtype=torch.bool)
        if self._kept is not None:
            before = self._kept
        now = torch.ones(self.count, new, dtype=torch.bool)
        if padding is not None:
            padding = padding.cpu()
            changed = (padding[:, :start] != before).nonzero()
            if changed.numel():
                row, token = changed[0].tolist()
                was = "a token" if before[row, token] else "padding"
                raise CacheError(
                    f"attention_mask: row {row}, token {token} was cached as {was}; expected the "
                    "same again, got the opposite"
                )
            now = padding[:, start : start + new]
        self._kept = torch.cat([before, now], 1)
        return now
