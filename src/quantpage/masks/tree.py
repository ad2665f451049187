"""Tree verification: several drafted continuations of one prompt, checked in one step.

The last tokens of the request are nodes of a tree, laid out parents first. A node sees the whole
prompt, its ancestors and itself (SpecInfer, arXiv 2305.09781). A word of bits a node says which
nodes it sees: at most 64 nodes, 8 bytes each, whatever the length of the prompt.

The positions of this mask are rows of the cache. Two nodes of one depth stand in two rows and share
one rotary position; that is the caller's to set.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from quantpage.masks.base import Keys, Mask, Queries, Seen
from quantpage.masks.checks import first_bad
from quantpage.masks.rows import RowIntervals

MAX_NODES = 64


@dataclass(frozen=True, slots=True, eq=False)
class TreeMask(Mask):
    """A bit mask over the last tokens; everything before them is seen.

    Raises ValueError for trees of another shape or dtype, or too many nodes, and for a node that
    does not see itself.
    """

    kind: ClassVar[str] = "interval"
    prefix: tuple[int, ...]
    """Tokens before the tree, a request (one entry serves every request)."""
    bits: Int[Tensor, "batch nodes"]
    """Bit t of node i (int64): node i sees node t."""
    rows: RowIntervals = field(init=False, repr=False)
    """The same as key ranges: what kernels read."""

    def __post_init__(self) -> None:
        bits = self.bits
        if bits.ndim != 2 or bits.dtype != torch.int64 or not 1 <= bits.shape[1] <= MAX_NODES:
            raise ValueError(
                f"bits: expected int64 [batch, 1..{MAX_NODES} nodes], got {bits.dtype} "
                f"{tuple(bits.shape)}"
            )
        seen = self._seen()
        nodes = bits.shape[1]
        bad = first_bad(~seen.diagonal(dim1=1, dim2=2))
        if bad is not None:
            raise ValueError(f"bits[{bad[0]}, {bad[1]}]: expected a node to see itself")
        later = torch.ones(nodes, nodes, dtype=torch.bool, device="cpu").triu(1).to(bits.device)
        bad = first_bad(seen & later)
        if bad is None and nodes < MAX_NODES:
            outside = first_bad((bits >> nodes) != 0)
            bad = None if outside is None else (*outside, nodes)
        if bad is not None:
            raise ValueError(
                f"bits[{bad[0]}, {bad[1]}]: expected only nodes before it and itself, "
                f"got bit {bad[2]}"
            )
        object.__setattr__(self, "rows", self._as_rows(seen))

    @classmethod
    def from_parents(
        cls, prefix: Sequence[int] | int, parents: Sequence[int] | Sequence[Sequence[int]]
    ) -> "TreeMask":
        """parents[i]: the node that node i continues, -1 for the prompt's own continuations.

        prefix: tokens before the tree, of every request or of each. Raises ValueError for a parent
        that does not come before, and for more nodes than a word has bits.
        """
        several = len(parents) > 0 and not isinstance(parents[0], int)
        trees: list[Any] = list(parents) if several else [parents]
        words = []
        for row, tree in enumerate(trees):
            if len(tree) > MAX_NODES:
                raise ValueError(f"parents: expected at most {MAX_NODES} nodes, got {len(tree)}")
            own: list[int] = []
            for node, parent in enumerate(tree):
                if not -1 <= parent < node:
                    where = f"parents[{row}][{node}]" if several else f"parents[{node}]"
                    raise ValueError(f"{where}: expected -1..{node - 1}, got {parent}")
                own.append((own[parent] if parent >= 0 else 0) | 1 << node)
            # Bit 63 is the sign of an int64.
            words.append([word - 2**64 if word >> 63 else word for word in own])
        if len({len(each) for each in words}) > 1:
            raise ValueError("parents: expected trees of one size, pad them with children of -1")
        starts = (prefix,) if isinstance(prefix, int) else tuple(prefix)
        return cls(starts, torch.tensor(words, dtype=torch.int64, device="cpu"))

    def visible(self, queries: Queries, keys: Keys, request: int = 0, kv_head: int = 0) -> Seen:
        """The prompt, the ancestors, itself; before the tree causally."""
        return self.rows.visible(queries, keys, request, kv_head)

    def key_range(
        self, first_query: int, last_query: int, keys: int, request: int = 0
    ) -> tuple[int, int]:
        """Keys up to the last query."""
        return self.rows.key_range(first_query, last_query, keys, request)

    @property
    def form(self) -> RowIntervals:
        """As Mask: rows."""
        return self.rows

    @property
    def requests(self) -> int:
        """As Mask: trees, or prompts that share one."""
        return self.rows.requests

    def described(self, request: int = 0) -> int:
        """As Mask: up to the last node."""
        return self.rows.described(request)

    def to(self, device: torch.device | str) -> "TreeMask":
        """The same mask on ``device``."""
        if self.bits.device == torch.device(device):
            return self
        return TreeMask(self.prefix, self.bits.to(device))

    def _seen(self) -> Bool[Tensor, "batch nodes nodes"]:
        shifts = torch.arange(self.bits.shape[1], device=self.bits.device)
        return (self.bits[..., None] >> shifts & 1).bool()

    def _as_rows(self, seen: Tensor) -> RowIntervals:
        batch = len(self.bits)
        prefix = self.prefix * batch if len(self.prefix) == 1 else self.prefix
        if batch == 1 and len(prefix) > 1:
            seen, batch = seen.expand(len(prefix), -1, -1), len(prefix)
        if len(prefix) != batch:
            raise ValueError(f"prefix: expected {batch} lengths, got {len(prefix)}")
        lists = [
            [[(0, start), *_runs(row, start)] for row in tree]
            for start, tree in zip(prefix, seen.tolist(), strict=True)
        ]
        width = max(len(row) for tree in lists for row in tree)
        padded = [[row + [(0, 0)] * (width - len(row)) for row in tree] for tree in lists]
        intervals = torch.tensor(padded, dtype=torch.int32, device=self.bits.device)
        return RowIntervals(intervals[:, None], first=prefix)


def _runs(row: list[bool], offset: int) -> list[tuple[int, int]]:
    """Runs of True as [start, end) ranges after ``offset``."""
    edges = [i for i in range(len(row) + 1) if (i < len(row) and row[i]) != (i > 0 and row[i - 1])]
    return [(offset + a, offset + b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
