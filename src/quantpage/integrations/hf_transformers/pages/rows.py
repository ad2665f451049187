"""The rows of a batch: their page tables, and the step that is under way.

Every layer of a forward writes the same tokens, so that one step (pages reserved, padding left
out, one ``BatchPlan`` for layers of one reach) serves them all.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantpage.batch import BatchPlan, ExactPlan
from quantpage.cache import (
    CacheLayout,
    LayerKV,
    Prefix,
    Reach,
    Sequence,
)
from quantpage.cache.reach import held_from, pages_seen
from quantpage.errors import CacheError, OutOfPages
from quantpage.integrations.hf_transformers.pages.memory import Basis, Memory
from quantpage.integrations.hf_transformers.pages.padding import extended, refuse_other, told
from quantpage.integrations.hf_transformers.pages.step import Part, Step, first_there, plan_part

if TYPE_CHECKING:
    from _thread import RLock


class Rows:
    """The rows of a batch, in a memory that other caches may share."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.page_size = memory, memory.page_size
        self._held: list[dict[Reach, list[Sequence]]] = [{}]
        # Pages of a cache that nobody uses any more go back to a memory that others share.
        memory.ledger.when_gone(self, partial(_free_all, self._held))
        self._kept: Tensor | None = None
        """[rows, tokens] bool: False where a token was padding; None: never padding."""
        self._length = 0
        self._step: Step | None = None
        self._planned: dict[Reach, Part] = {}
        """The newest step, from which the next may follow."""
        self.lent: frozenset[int] = frozenset()
        """Layers whose keys and values later layers read as well."""
        self.attention_mask: Any = None
        """What the forward under way was given, for layers that are read by others than our
        attention function, which knows the padding by itself."""
        self.given: int | None = None
        """Tokens a row that it was given."""
        self._added = 0
        """Tokens that the model put before a prompt by itself, which no mask tells of."""
        self.frozen: Step | None = None
        """The step of a CUDA graph under capture: every layer gets it, whatever it asks for."""

    @property
    def tables(self) -> dict[Reach, list[Sequence]]:
        """The rows, with a page table each for the layers of every reach."""
        return self._held[0]

    @tables.setter
    def tables(self, tables: dict[Reach, list[Sequence]]) -> None:
        self._held[0] = tables

    @property
    def sequences(self) -> list[Sequence]:
        """The rows in the tables of some reach; all count the same tokens."""
        return next(iter(self.tables.values()), [])

    @property
    def padded(self) -> bool:
        """Whether some token was padding."""
        return self._kept is not None and not bool(self._kept.all())

    @property
    def count(self) -> int:
        """Rows of the batch."""
        return len(self.sequences)

    def add_layer(
        self,
        index: int,
        layout: CacheLayout,
        reach: Reach,
        like: Tensor,
        basis: Basis,
    ) -> None:
        """Allocate a layer as soon as its keys are known; ``like`` is [rows, ...]."""
        with self.memory.ledger.lock:
            self.memory.add_layer(index, layout, reach, like.device, basis)
        self.begin(like.shape[0])

    def begin(self, rows: int) -> None:
        """Have so many rows; ValueError where there are others."""
        if self.tables and rows != self.count:
            raise ValueError(
                f"past_key_values: expected {self.count} rows, as the cache holds, got "
                f"{rows} (batch_repeat_interleave makes more of one)"
            )
        if not self.tables:
            self.tables = {
                each: [shelf.new_sequence() for _ in range(rows)]
                for each, shelf in self.memory.shelves.items()
            }

    def still(self) -> "RLock":
        """To be held while pages are read or written: other caches in this memory may make it
        grow, and pages move."""
        return self.memory.ledger.lock

    def layer(self, index: int) -> LayerKV:
        """The pages of one layer."""
        return self.memory.layer(index)

    def step(self, start: int, new: int, padding: Tensor | None) -> Step:
        """The step that brings tokens ``start`` .. ``start + new`` of every row.

        Asked by each layer; the first to ask reserves the pages. padding: [rows, start + new]
        bool, False for padding.
        """
        if self.frozen is not None:
            return self.frozen
        if self._step is not None and (self._step.start, self._step.new) == (start, new):
            return self._step
        return self.memory.ledger.whole(self._begin_step, start, new, padding)

    def _begin_step(self, start: int, new: int, padding: Tensor | None) -> Step:
        self.settle()
        self._note("_step", "_kept")
        if start != self._length:
            raise CacheError(
                f"step: expected it to start after {self._length} cached tokens, got {start}"
            )
        self._kept = extended(self._kept, padding, (self.count, start, new))
        kept = None if self._kept is None else self._kept[:, start:]
        lengths = [new] * self.count if kept is None else kept.sum(1).tolist()
        self._reserve(lengths, sparse=True)
        keep = None
        if kept is not None:
            keep = kept.flatten().nonzero().flatten().to(self._device)
        self._step = Step(start, new, self.count, self._parts(lengths), keep)
        return self._step

    def told_padding(self, start: int, new: int) -> Tensor | None:
        """[rows, start + new] bool, False for padding, as far as the forward's mask tells."""
        if not start:
            self._added = 0 if self.given is None else max(0, new - self.given)
        mask = told(self.attention_mask, self._kept, (self.count, start, new))
        short = mask is not None and mask.shape[1] == start + new - self._added
        if mask is None or not self._added or not short or not bool(mask.all()):
            return mask
        return mask.new_ones(mask.shape[0], start + new)

    def refuse_other_padding(self, mask: Any) -> None:
        """CacheError where a forward's mask takes padding that is cached for tokens."""
        refuse_other(mask, self._kept, self._length)

    def reserve_ahead(self, tokens: int) -> dict[Reach, BatchPlan]:
        """Pages for ``tokens`` more in every row, and the plans of the first of them.

        For CUDA graphs: the plans' host lengths are those of the last token, upper bounds for
        all. The tokens count as cached from then on.
        """
        return self.memory.ledger.whole(self._reserve_ahead, tokens)

    def _reserve_ahead(self, tokens: int) -> dict[Reach, BatchPlan]:
        self.settle()
        self._note("_step")
        if self._kept is not None:
            raise CacheError("reserve_ahead: expected rows without padding, got padded rows")
        start = self._length
        self._reserve([tokens] * self.count, sparse=False)
        parts = self._parts([tokens] * self.count)
        self._step = Step(start, tokens, self.count, parts, None)
        return {reach: self._first_token(part.batch, start) for reach, part in parts.items()}

    def _first_token(self, ahead: BatchPlan, start: int) -> BatchPlan:
        """The plan of the first token of a plan of several a row."""
        at = (torch.arange(self.count, device="cpu") * ahead.max_query_len).to(ahead.slots.device)
        exact = ahead.exact
        if exact is not None:
            exact = ExactPlan(exact.page_table, exact.slots[at].clone())
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
            first_pages=ahead.first_pages,
        )

    @property
    def _device(self) -> torch.device:
        return next(iter(self.memory.shelves.values())).store.device

    def open(self, index: int, step: Step, reach: Reach) -> LayerKV:
        """The pages in which layer ``index`` writes and attends in this step."""
        pages, working = self.layer(index), step.parts[reach].working
        if working is None:
            return pages
        if index in step.closed:
            raise CacheError(
                f"layer {index}: expected its keys and values to be read before those of the next "
                "layer, got a second reader after it"
            )
        if index not in step.opened:
            # Those of the layer before may be free only now (a reader other than ours).
            for each in step.opened.keys() - self.lent:
                del step.opened[each]
                step.closed.add(each)
            layout = self.memory.layouts[index]
            self.memory.note_peak(working.nbytes(layout))
            step.opened[index] = working.open(layout, pages)
        return step.opened[index]

    def close(self, index: int, step: Step, reach: Reach, read: bool) -> None:
        """The layer has written: what later steps see goes to the pages that they see.

        read: nobody reads the step's pages after this, unless the layer is ``lent``.
        """
        working = step.parts[reach].working
        if working is None:
            return
        working.close(step.opened[index], self.layer(index))
        if read and index not in self.lent:
            del step.opened[index]
            step.closed.add(index)

    def readable(self, index: int) -> LayerKV:
        """The pages that ``dense`` tells of."""
        opened = {} if self._step is None else self._step.opened
        return opened.get(index, self.layer(index))

    def dense(self, index: int, reach: Reach, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each row: the pages that hold what its queries see, to the end, and the places
        among ``length`` of the tokens in them.

        The pages are those of ``open`` in a step that works elsewhere.
        """
        part = None if self._step is None else self._step.parts[reach]
        working = None if part is None or part.working is None else part.working.codes
        for row, sequence in enumerate(self.tables[reach]):
            pages = sequence.pages if working is None else working.tables[row]
            first = first_there(pages)
            if first > pages_seen(reach, sequence.length, sequence.length + 1, self.page_size)[0]:
                raise CacheError(
                    f"layer {index}: expected pages from token {reach.first_seen(sequence.length)} "
                    f"on, got them from token {first * self.page_size} on"
                )
            if self._kept is None:
                places = torch.arange(length, device="cpu")
            else:
                places = self._kept[row, :length].nonzero().flatten()
            table = torch.tensor(pages[first:], dtype=torch.int32, device="cpu")
            yield table.to(self._device), places[first * self.page_size :].to(self._device)

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row ``rows[i]`` was; pages are shared, not copied."""
        self.memory.ledger.whole(self._select, rows)

    def _select(self, rows: list[int]) -> None:
        self.settle()
        self._note("tables", "_kept")
        forked = {
            reach: [sequences[row].fork() for row in rows]
            for reach, sequences in self.tables.items()
        }
        self._free()
        self.tables = forked
        if self._kept is not None:
            self._kept = self._kept[rows]

    def fork(self) -> "Rows":
        """The same rows again, in the same memory; pages are shared, not copied."""
        return self.memory.ledger.whole(self._fork)

    def _fork(self) -> "Rows":
        self.settle()
        made = Rows(self.memory)
        made._kept, made._length, made.lent = self._kept, self._length, self.lent
        made._added = self._added
        made.tables = {
            reach: [each.fork() for each in sequences] for reach, sequences in self.tables.items()
        }
        return made

    def adopt(self, prefixes: Mapping[Reach, Prefix]) -> None:
        """Begin a single row with pages that another cache in this memory wrote."""
        self.memory.ledger.whole(self._adopt, prefixes)

    def _adopt(self, prefixes: Mapping[Reach, Prefix]) -> None:
        self._note("tables", "_length")
        self.tables = {}
        for reach, prefix in prefixes.items():
            sequence = self.memory.shelves[reach].new_sequence()
            sequence.adopt(prefix)
            self.tables[reach] = [sequence]
            self._length = sequence.length

    @property
    def kept(self) -> Tensor | None:
        """[rows, tokens] bool: False where a token was padding; None: never padding."""
        return self._kept

    @property
    def length(self) -> int:
        """Tokens a row, padding counted."""
        return self._length

    def hold(self, tables: dict[Reach, list[Sequence]], kept: Tensor | None, length: int) -> None:
        """Be what a file gave, in rows that hold nothing yet."""
        self.tables, self._kept, self._length = tables, kept, length

    def cancel(self) -> None:
        """Take the step under way back, as if it had not begun: its tokens were not written."""
        self.memory.ledger.whole(self._cancel)

    def _cancel(self) -> None:
        self._note("_step", "_kept", "tables")
        for sequence in self._all():
            sequence.cancel()
        self._step = None
        if self._kept is not None:
            self._kept = self._kept[:, : self._length] if self._length else None
        if not self._length:
            # The next prompt may have another number of rows.
            self.tables = {}

    def _note(self, *names: str) -> None:
        self.memory.ledger.keep(self, *names)

    def _all(self) -> Iterator[Sequence]:
        """The rows in every table."""
        return chain.from_iterable(self.tables.values())

    def _free(self) -> None:
        _free(self.tables)

    def crop(self, length: int) -> None:
        """Forget tokens from ``length`` (padding counted) on, in every row.

        Raises CacheError, with nothing changed, where a page that the next token needs is gone.
        """
        self.memory.ledger.whole(self._crop, length)

    def _crop(self, length: int) -> None:
        self._note("_step", "_kept", "_length")
        if self._kept is None:
            tokens = [length] * self.count
        else:
            tokens = self._kept[:, :length].sum(1).tolist()
        for sequences in self.tables.values():
            for sequence, kept in zip(sequences, tokens, strict=True):
                sequence.check_crop(kept)
        step, self._step = self._step, None
        for sequences in self.tables.values():
            for sequence, kept in zip(sequences, tokens, strict=True):
                if step is not None:
                    # Never counted, so that a draft may be longer than what is kept for rollbacks.
                    sequence.commit(min(max(kept - sequence.length, 0), sequence.reserved))
                sequence.crop(kept)
        if self._kept is not None:
            self._kept = self._kept[:, :length]
        self._length = length

    def clear(self) -> None:
        """Forget every token and row; pages stay allocated for the next prompt."""
        self.memory.ledger.whole(self._clear)

    def _clear(self) -> None:
        self._note("_step", "_kept", "_length", "tables")
        self._free()
        self._step, self._kept, self._length, self.tables = None, None, 0, {}

    def used_bytes(self) -> int:
        """Bytes of the pages that these rows hold; one that several hold counts once."""
        total = 0
        for reach, sequences in self.tables.items():
            shelf = self.memory.shelves[reach]
            pages, exact_pages = shelf.held(sequences)
            total += shelf.store.used_bytes(len(pages), len(exact_pages))
        return total

    def unquantized_bytes(self) -> int:
        """What Transformers' own cache holds for the same tokens: of layers with a window, those
        that the next query sees; padding, which it holds, too, is not counted."""
        total = 0
        for reach, sequences in self.tables.items():
            lengths = [each.length + each.reserved for each in sequences]
            tokens = sum(length - held_from(reach, length) for length in lengths)
            layouts = self.memory.shelves[reach].store.layouts.values()
            total += tokens * sum(each.unquantized_bytes_per_token() for each in layouts)
        return total

    def settle(self) -> None:
        """Commit the step under way."""
        if self._step is not None:
            self.memory.ledger.whole(self._settle, self._step)

    def _settle(self, step: Step) -> None:
        self._note("_step", "_length")
        for sequence in self._all():
            sequence.commit()
        self._length = step.start + step.new
        self._step = None

    def _reserve(self, lengths: list[int], sparse: bool) -> None:
        limit = self.memory.max_tokens
        longest = max(
            (each.length + new for each, new in zip(self.sequences, lengths, strict=True)),
            default=0,
        )
        if limit is not None and longest > limit:
            raise OutOfPages(
                f"max_tokens: expected at most {limit} tokens a row, as attach was told, got "
                f"{longest}"
            )
        for reach, sequences in self.tables.items():
            needs = [
                sequence.pages_needed(tokens, sparse)
                for sequence, tokens in zip(sequences, lengths, strict=True)
            ]
            need, exact_need = (sum(column) for column in zip(*needs, strict=True))
            self.memory.make_room(self.memory.shelves[reach], need, exact_need, self.count)
        for reach, sequences in self.tables.items():
            store = self.memory.shelves[reach].store
            for sequence, tokens in zip(sequences, lengths, strict=True):
                store.copy_pages(sequence.reserve(tokens, sparse))

    def _parts(self, lengths: list[int]) -> dict[Reach, Part]:
        """The step that is reserved, for the layers of every reach."""
        self._planned = {
            reach: plan_part(
                sequences, self.memory.shelves[reach], lengths, self._planned.get(reach)
            )
            for reach, sequences in self.tables.items()
        }
        return self._planned


def _free_all(held: list[dict[Reach, list[Sequence]]]) -> None:
    _free(held[0])


def _free(tables: Mapping[Reach, list[Sequence]]) -> None:
    for sequence in chain.from_iterable(tables.values()):
        sequence.free()
