"""Who may see whom. ``materialize`` is the oracle; integers and intervals feed the kernels.

Positions are absolute: key j of a request is its j-th token, whatever was cached when and however
the work was cut. Query i of a request with c cached tokens stands at position c + i.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from quantpage.cache.counts import whole

if TYPE_CHECKING:
    from quantpage.masks.draw import Picture

Queries = Int[Tensor, " queries"]
"""Positions of queries."""
Keys = Int[Tensor, " keys"]
"""Positions of keys."""
Seen = Bool[Tensor, "queries keys"]
"""True where a query sees a key."""


class Mask(ABC):
    """What every mask can say of itself."""

    kind: ClassVar[str] = "asked"
    """'causal', 'full', 'interval', or 'asked' pair by pair: what a backend or an implementation
    accepts. An interval mask has a ``form`` that kernels read."""

    @property
    def form(self) -> "Mask":
        """The same mask as planners and kernels read it: columns, rows, or itself."""
        return self

    @property
    def requests(self) -> int:
        """Requests that the mask tells apart; 1: one rule for all."""
        return 1

    @property
    def heads(self) -> int:
        """kv_heads that the mask tells apart; 1: one rule for all."""
        return 1

    @property
    def per_head(self) -> bool:
        """True where kv_heads see different keys."""
        return self.heads > 1

    def described(self, request: int = 0) -> int:
        """Positions of a request that the mask describes; past them the rule of its form goes on.

        0: the rule is the same everywhere.
        """
        return 0

    @abstractmethod
    def visible(self, queries: Queries, keys: Keys, request: int = 0, kv_head: int = 0) -> Seen:
        """True where the query at position ``queries[i]`` sees the key at position ``keys[j]``."""

    @abstractmethod
    def key_range(
        self, first_query: int, last_query: int, keys: int, request: int = 0
    ) -> tuple[int, int]:
        """Half-open range outside which no query of first..last (inclusive) sees a key.

        Tiles outside are skipped, never read. May be wider than needed, never narrower.
        """

    def materialize(
        self, queries: Queries, num_keys: int, request: int = 0, kv_head: int = 0
    ) -> Seen:
        """``visible`` over keys 0 .. num_keys - 1: the oracle."""
        keys = torch.arange(num_keys, device=queries.device)
        return self.visible(queries, keys, request, kv_head)

    def cuts(self, length: int, request: int = 0) -> Bool[Tensor, " length_plus_1"]:
        """True at each place 0 .. length where a prompt of ``length`` tokens may be cut.

        No query before a cut sees a key after it, so that the chunks before the cut find all of
        their keys in the cache. Causal masks may be cut anywhere.
        """
        return torch.ones(length + 1, dtype=torch.bool, device="cpu")

    def next_cut(self, position: int, length: int, request: int = 0) -> int:
        """First place at or after ``position`` where a prompt of ``length`` tokens may be cut."""
        if position >= length:
            return length
        return position + int(self.cuts(length, request)[position:].nonzero()[0])

    def to(self, device: torch.device | str) -> "Mask":
        """The same mask with its tensors, where it has any, on ``device``."""
        return self

    def draw(
        self,
        tokens: int,
        *,
        tile: tuple[int, int] = (8, 8),
        request: int = 0,
        kv_head: int = 0,
    ) -> "Picture":
        """The mask of ``tokens`` queries over as many keys; ``print`` it or ``save`` a PNG.

        tile: queries and keys a tile, coloured full, partial or skipped.
        """
        from quantpage.masks.draw import Picture

        seen = self.materialize(torch.arange(tokens, device="cpu"), tokens, request, kv_head)
        return Picture(seen, *tile)

    def intersect(self, other: "Mask") -> "Mask | None":
        """What both masks show, in a form that this class knows; None: it knows none for ``other``.

        ``a & b`` asks both. ValueError where the form cannot hold it.
        """
        return None

    def __and__(self, other: "Mask") -> "Mask":
        """What both masks show, where one of the two can say it; ValueError says why it cannot."""
        if not isinstance(other, Mask):
            return NotImplemented
        for one, another in ((self, other), (other, self)):
            found = one.intersect(another)
            if found is not None:
                return found
        raise ValueError(
            f"mask: expected two masks of one form (columns & columns, rows & rows, or either & "
            f"causal), got {type(self).__name__} & {type(other).__name__}"
        )


class IntervalMask(Mask):
    """A mask that one tensor tells: [batch, heads, ...], a row a request and kv_head.

    batch 1 serves every request, heads 1 every kv_head.
    """

    kind: ClassVar[str] = "interval"

    @property
    @abstractmethod
    def _told(self) -> Tensor:
        """The tensor."""

    @property
    def heads(self) -> int:
        """As Mask: kv_heads that were given rows of their own, or 1."""
        return self._told.shape[1]

    @property
    def requests(self) -> int:
        """As Mask: batch rows, or 1."""
        return self._told.shape[0]


@dataclass(frozen=True, slots=True)
class CausalMask(Mask):
    """Query i sees keys up to and including its own position.

    window: only the last ``window`` keys, its own included (None: all). sink_tokens: with a
    window, the first tokens of the request stay visible (StreamingLLM, arXiv 2309.17453). Raises
    ValueError for a window below 1 and sink tokens below 0.
    """

    kind: ClassVar[str] = "causal"
    window: int | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.window is not None:
            whole("window", self.window, 1)
        whole("sink_tokens", self.sink_tokens)

    def visible(self, queries: Queries, keys: Keys, request: int = 0, kv_head: int = 0) -> Seen:
        """k <= q, and within the window or among the sink tokens."""
        q, k = queries[:, None], keys[None, :]
        seen = k <= q
        if self.window is not None:
            seen &= (k > q - self.window) | (k < self.sink_tokens)
        return seen

    def key_range(
        self, first_query: int, last_query: int, keys: int, request: int = 0
    ) -> tuple[int, int]:
        """From the first query's window to the last query's own key."""
        start = 0
        if self.window is not None and self.sink_tokens == 0:
            start = max(0, first_query - self.window + 1)
        return min(start, keys), min(last_query + 1, keys)

    def intersect(self, other: Mask) -> "CausalMask | None":
        """The narrower window of two; ValueError for other sink tokens."""
        if not isinstance(other, CausalMask):
            return None
        if self.window is None or other.window is None:
            return self if other.window is None else other
        if self.sink_tokens != other.sink_tokens:
            raise ValueError(
                "mask: expected windows with the same sink_tokens, got "
                f"{self.sink_tokens} & {other.sink_tokens}"
            )
        return CausalMask(min(self.window, other.window), self.sink_tokens)


@dataclass(frozen=True, slots=True)
class FullMask(Mask):
    """Every query sees every key of its request (encoders, bidirectional blocks)."""

    kind: ClassVar[str] = "full"

    def visible(self, queries: Queries, keys: Keys, request: int = 0, kv_head: int = 0) -> Seen:
        """All True."""
        return torch.ones(queries.shape[0], keys.shape[0], dtype=torch.bool, device=queries.device)

    def key_range(
        self, first_query: int, last_query: int, keys: int, request: int = 0
    ) -> tuple[int, int]:
        """All keys."""
        return 0, keys

    def cuts(self, length: int, request: int = 0) -> Bool[Tensor, " length_plus_1"]:
        """Only the start and the end: every query sees every key."""
        good = torch.zeros(length + 1, dtype=torch.bool, device="cpu")
        good[[0, length]] = True
        return good

    def intersect(self, other: Mask) -> Mask:
        """The other one."""
        return other
