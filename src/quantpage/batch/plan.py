"""The record of one step: its tensors, what the host knows of them, and steps made of its parts.

A plan is checked when it is built, so that what every layer would ask is asked once a step: shapes,
dtypes and host integers anywhere, the numbers inside the tensors (checks) where the host has them.
"""

from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from quantpage.batch.checks import (
    INT32_END,
    check_exact_table,
    check_lengths,
    check_page_table,
    check_positions,
    whole_numbers,
)
from quantpage.hardware import upload

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class ExactPlan:
    """Where a step's exact pages are (formats that keep some)."""

    page_table: Int[Tensor, "requests max_pages"]
    """int32: logical page -> exact page, -1 where the page is not kept. Every page that a new token
    stands in is present, and so are the page before the first of them and each request's first."""
    slots: Int[Tensor, " tokens"]
    """int64: exact page * page_size + offset of each new token."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class BatchPlan:
    """One step's requests; see the package's example. ValueError for what cannot be a step."""

    query_starts: Int[Tensor, " requests_plus_1"]
    """int32: first row of each request, and the end."""
    context_lens: Int[Tensor, " requests"]
    """int32: cached + new tokens of each request."""
    page_table: Int[Tensor, "requests max_pages"]
    """int32: page ids; entries past a request's context are never read."""
    slots: Int[Tensor, " tokens"]
    """int64: page * page_size + offset where each new token is written; -1 is skipped."""
    positions: Int[Tensor, " tokens"]
    """int64: index of each new token in its request; the causal rule compares these."""
    page_size: int
    query_lens: tuple[int, ...]
    """Host copy: new tokens a request."""
    host_context_lens: tuple[int, ...]
    """Host copy of ``context_lens``; under CUDA graphs an upper bound."""
    exact: ExactPlan | None = None
    first_pages: tuple[int, ...] | None = None
    """Host: logical page of each request from which on the tables hold its pages; those before were
    given back, and no query of the step may see them (a window). None: all are there."""
    largest_page: int | None = field(init=False, repr=False, compare=False, default=None)
    """Largest page id that the step reads or writes, -1 where there is none; None: only the device
    knows."""
    largest_exact_page: int | None = field(init=False, repr=False, compare=False, default=None)
    """The same of the exact pages."""
    bounded: bool = field(init=False, repr=False, compare=False, default=False)
    """True: ``host_context_lens`` is known to be above ``context_lens`` somewhere."""
    passed: set[Hashable] = field(init=False, repr=False, compare=False, default_factory=set)
    """What ops/checks has found right in this step: its next layers ask no more."""
    _stamp: tuple[int, ...] | None = field(init=False, repr=False, compare=False, default=None)
    """Writes that the tensors had seen when they were checked; None: nobody counts them."""
    _on_host: bool = field(init=False, repr=False, compare=False, default=False)
    """True: numbers are checked, again after somebody wrote to the tensors."""
    _exact_step: "BatchPlan | None" = field(init=False, repr=False, compare=False, default=None)
    _shared: tuple[Any, dict[Hashable, Any]] = field(
        init=False, repr=False, compare=False, default_factory=lambda: (None, {})
    )
    """Writes that the tensors had seen, and what ops made of the step until then."""

    def __post_init__(self) -> None:
        self._check_host()
        self._check_tensors()
        if self.device.type == "cpu":
            _set(self, _on_host=True)
            self._check_numbers()

    @property
    def num_requests(self) -> int:
        """Requests in the step."""
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        """New tokens in the step."""
        return sum(self.query_lens)

    @property
    def max_query_len(self) -> int:
        """Most new tokens of one request."""
        return max(self.query_lens, default=0)

    @property
    def max_context_len(self) -> int:
        """Longest context, an upper bound under CUDA graphs."""
        return max(self.host_context_lens, default=0)

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.page_table.device

    def to(self, device: torch.device | str) -> "BatchPlan":
        """The same step with its tensors on ``device``; what the host knows of it stays known.

        A GPU copies them in its current stream: the host does not wait, another stream has to.
        """
        if torch.device(device) == self.device:
            return self
        moved: dict[str, Any] = {
            name: upload(getattr(self, name), device)
            for name in ("query_starts", "context_lens", "page_table", "slots", "positions")
        }
        if self.exact is not None:
            exact = self.exact
            moved["exact"] = ExactPlan(
                upload(exact.page_table, device), upload(exact.slots, device)
            )
        return derive(self, **moved)

    def check_values(self) -> None:
        """Check the numbers in the tensors, wherever they are: reads back from the device.

        For debugging, and what checked mode calls: a plan that was made by hand on a GPU has page
        ids, slots and lengths that only the device knows. From then on its largest page is known.
        """
        host = self.to("cpu")
        _set(host, _on_host=True)
        host._check_numbers()
        _set(
            self,
            largest_page=host.largest_page,
            largest_exact_page=host.largest_exact_page,
            bounded=host.bounded,
        )

    def check_unchanged(self) -> None:
        """Check the numbers again if a tensor was written to since; a microsecond if not."""
        if not self._on_host:
            return
        if not self.unchanged():
            self.passed.clear()
            _set(self, _exact_step=None)
            self._check_numbers()

    def unchanged(self) -> bool:
        """Whether the numbers were checked here, and no tensor was written to since."""
        return self._on_host and self._stamp is not None and self._stamp == self._writes()

    def exact_step(self) -> "BatchPlan":
        """The same step over the exact pages, as pages of their own; made once.

        Entries of its page_table are -1 where a page is not kept.
        """
        if self._exact_step is None:
            assert self.exact is not None
            made = derive(
                self,
                page_table=self.exact.page_table,
                slots=self.exact.slots,
                exact=None,
                largest_page=self.largest_exact_page,
            )
            _set(self, _exact_step=made)
        assert self._exact_step is not None
        return self._exact_step

    def part(self, first: int, end: int) -> "BatchPlan":
        """The step of the requests first .. end - 1 alone, its rows counted from the first of
        theirs; made once.
        """
        if end - first == self.num_requests:
            return self
        return self.once(("part", first, end), lambda: _part(self, first, end))

    def once(self, what: Hashable, make: Callable[[], Made]) -> Made:
        """``make()``, or what it gave for ``what`` in another layer of the step.

        Made anew where a tensor was written to since, or nobody counts the writes, or a CUDA graph
        is being captured, which may be replayed with other numbers.
        """
        writes = self._writes()
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if writes is None or capturing:
            return make()
        if self._shared[0] != writes:
            _set(self, _shared=(writes, {}))
        kept = self._shared[1]
        if what not in kept:
            kept[what] = make()
        return kept[what]

    def _tensors(self) -> dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]]:
        """Each tensor by name, with what its dtype and shape have to be (-1: at least 1)."""
        requests, tokens = len(self.query_lens), sum(self.query_lens)
        found = {
            "query_starts": (self.query_starts, torch.int32, (requests + 1,)),
            "context_lens": (self.context_lens, torch.int32, (requests,)),
            "page_table": (self.page_table, torch.int32, (requests, -1)),
            "slots": (self.slots, torch.int64, (tokens,)),
            "positions": (self.positions, torch.int64, (tokens,)),
        }
        if self.exact is not None:
            found["exact.page_table"] = (self.exact.page_table, torch.int32, (requests, -1))
            found["exact.slots"] = (self.exact.slots, torch.int64, (tokens,))
        return found

    def _check_host(self) -> None:
        for name in ("query_lens", "host_context_lens"):
            _set(self, **{name: whole_numbers(name, getattr(self, name))})
        (size,) = whole_numbers("page_size", (self.page_size,))
        if size < 1:
            raise ValueError(f"page_size: expected at least 1 token, got {size}")
        if len(self.query_lens) != len(self.host_context_lens):
            raise ValueError(
                f"host_context_lens: expected {len(self.query_lens)}, one a request, "
                f"got {len(self.host_context_lens)}"
            )
        for row, (new, context) in enumerate(
            zip(self.query_lens, self.host_context_lens, strict=True)
        ):
            if not 0 <= new <= context < INT32_END:
                raise ValueError(
                    f"query_lens[{row}], host_context_lens[{row}]: expected 0 <= new <= context "
                    f"< 2^31, got {new} and {context}"
                )
        if self.first_pages is None:
            return
        _set(self, first_pages=whole_numbers("first_pages", self.first_pages))
        pages = tuple(context // size for context in self.host_context_lens)
        if len(self.first_pages) != len(pages):
            raise ValueError(
                f"first_pages: expected {len(pages)}, one a request, got {len(self.first_pages)}"
            )
        for row, (first, most) in enumerate(zip(self.first_pages, pages, strict=True)):
            if not 0 <= first <= most:
                raise ValueError(f"first_pages[{row}]: expected 0..{most}, got {first}")

    def _check_tensors(self) -> None:
        for name, (given, dtype, shape) in self._tensors().items():
            if given.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype}, got {given.dtype}")
            fits = given.ndim == len(shape) and all(
                got >= 1 if wanted == -1 else got == wanted
                for got, wanted in zip(given.shape, shape, strict=True)
            )
            if not fits:
                wanted = ", ".join("at least 1" if each == -1 else str(each) for each in shape)
                raise ValueError(f"{name}: expected shape [{wanted}], got {tuple(given.shape)}")
            if given.device != self.device:
                raise ValueError(
                    f"{name}: expected it on {self.device} as page_table, got {given.device}"
                )
            if given.shape[-1] > 1 and given.stride(-1) != 1:
                raise ValueError(f"{name}: expected a contiguous last dimension, got strides "
                                 f"{given.stride()}")  # fmt: skip
        tables = {"page_table": self.page_table}
        if self.exact is not None:
            tables["exact.page_table"] = self.exact.page_table
        for name, table in tables.items():
            if self.max_context_len > table.shape[1] * self.page_size:
                raise ValueError(
                    f"{name}: expected {-(-self.max_context_len // self.page_size)} columns for "
                    f"contexts of up to {self.max_context_len} tokens, got {table.shape[1]}"
                )

    def _check_numbers(self) -> None:
        """What the tensors hold, on the host."""
        starts, contexts, table, slots, positions = (
            each.numpy()
            for each in (
                self.query_starts, self.context_lens, self.page_table, self.slots, self.positions,
            )
        )  # fmt: skip
        new = np.array(self.query_lens, dtype=np.int64)
        bounded = check_lengths(starts, contexts, new, self.host_context_lens)
        contexts = contexts.astype(np.int64)
        owners = check_positions(positions, new, contexts)
        first = np.array(self.first_pages or (0,) * len(new), dtype=np.int64)
        step = new, contexts, owners, positions, first
        largest = check_page_table(table, slots, step, self.page_size)
        largest_exact = None
        if self.exact is not None:
            largest_exact = check_exact_table(
                self.exact.page_table.numpy(),
                self.exact.slots.numpy(),
                step,
                self.page_size,
            )
        _set(
            self,
            largest_page=largest,
            largest_exact_page=largest_exact,
            bounded=bounded,
            _stamp=self._writes(),
        )

    def _writes(self) -> tuple[int, ...] | None:
        """torch counts writes to a tensor, unless it was made in inference mode."""
        exact = () if self.exact is None else (self.exact.page_table, self.exact.slots)
        try:
            # Spelled out, as every layer of a step asks: a loop takes longer.
            return (
                self.query_starts._version,
                self.context_lens._version,
                self.page_table._version,
                self.slots._version,
                self.positions._version,
                *[each._version for each in exact],
            )
        except RuntimeError:
            return None


def derive(batch: BatchPlan, **changes: Any) -> BatchPlan:
    """A step made of the parts of a checked one, which are not checked again."""
    made = copy(batch)
    _set(made, passed=set(), _exact_step=None, _shared=(None, {}), _on_host=False, **changes)
    return made


def _part(batch: BatchPlan, first: int, end: int) -> BatchPlan:
    rows = slice(sum(batch.query_lens[:first]), sum(batch.query_lens[:end]))
    exact, firsts = batch.exact, batch.first_pages

    def own(tensor: Tensor, where: slice) -> Tensor:
        # Kernels are compiled for addresses that are multiples of 16 bytes.
        return tensor[where].clone() if where.start else tensor[where]

    requests = slice(first, end)
    # Outside of inference mode, so that torch counts writes to them.
    with torch.inference_mode(False):
        return derive(
            batch,
            query_starts=own(batch.query_starts, slice(first, end + 1)) - rows.start,
            context_lens=own(batch.context_lens, requests),
            page_table=own(batch.page_table, requests),
            slots=own(batch.slots, rows),
            positions=own(batch.positions, rows),
            query_lens=batch.query_lens[requests],
            host_context_lens=batch.host_context_lens[requests],
            exact=None
            if exact is None
            else ExactPlan(own(exact.page_table, requests), own(exact.slots, rows)),
            first_pages=None if firsts is None else firsts[requests],
        )


def one_more(batch: BatchPlan) -> BatchPlan | None:
    """The step after a checked one, in which every request brings one token to the page that it
    wrote last: what was checked of ``batch`` holds of it, and nothing is asked again.

    None where that does not follow: other steps than of a token a request, a token that begins a
    page, numbers that only a GPU knows, tensors that were written to since.
    """
    contexts = batch.host_context_lens
    full = any(not context % batch.page_size or context == INT32_END - 1 for context in contexts)
    if full or any(new != 1 for new in batch.query_lens) or batch.bounded or not batch.unchanged():
        return None
    exact = batch.exact
    with torch.inference_mode(False):
        made = derive(
            batch,
            context_lens=batch.context_lens + 1,
            positions=batch.positions + 1,
            slots=_after(batch.slots),
            host_context_lens=tuple(context + 1 for context in contexts),
            exact=None if exact is None else ExactPlan(exact.page_table, _after(exact.slots)),
        )
        _set(made, _on_host=True, _stamp=made._writes())
        return made


def _after(slots: Tensor) -> Tensor:
    """The slots after these in their pages; -1 stays, as it is skipped."""
    return slots + (slots >= 0)


def bound_lengths(batch: BatchPlan) -> BatchPlan:
    """``batch`` itself, told that its ``host_context_lens`` may be above what its device knows."""
    if batch.device.type != "cpu":
        _set(batch, bounded=True)
    return batch


def _set(plan: BatchPlan, **facts: Any) -> None:
    for name, value in facts.items():
        object.__setattr__(plan, name, value)
