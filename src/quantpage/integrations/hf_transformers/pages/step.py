"""One step of all rows: what its layers share, and the pages that each of them works in."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from torch import Tensor

from quantpage.batch import BatchPlan, one_more, plan_batch
from quantpage.cache import LayerKV, Reach, Sequence, Working, find_working
from quantpage.integrations.hf_transformers.pages.memory import Shelf

Tables = tuple[list[list[int]], list[list[int]], list[int] | None]
"""Pages and exact pages of each row, and the first pages that are there where a window lets go."""


@dataclass(frozen=True, slots=True)
class Part:
    """A step for the layers of one reach."""

    batch: BatchPlan
    working: Working | None = None
    """What a layer works in, where the step reads pages that are not kept."""
    tables: Tables = ([], [], None)
    """What the plan was made of."""


@dataclass(frozen=True, slots=True)
class Step:
    """One forward's new tokens."""

    start: int
    """Tokens a row before it, padding included."""
    new: int
    rows: int
    parts: dict[Reach, Part]
    keep: Tensor | None
    """Indices of the tokens that are not padding among rows * new; None: all of them."""
    opened: dict[int, LayerKV] = field(default_factory=dict)
    """Layer -> the working pages of this step, while somebody may read them once more."""
    closed: set[int] = field(default_factory=set)
    """Layers whose working pages were there and are gone."""

    def pack(self, x: Tensor) -> Tensor:
        """[rows, heads, new, width] -> [tokens, heads, width] without padding."""
        # One operation for a single token: a decode step comes here three times a layer.
        flat = x.squeeze(2) if self.new == 1 else x.transpose(1, 2).flatten(0, 1)
        return flat if self.keep is None else flat[self.keep]

    def unpack(self, x: Tensor) -> Tensor:
        """[tokens, heads, width] -> [rows * new, heads, width], zeros for padding."""
        if self.keep is None:
            return x
        out = x.new_zeros(self.rows * self.new, *x.shape[1:])
        out[self.keep] = x
        return out


def plan_part(
    rows: Rows[Sequence], shelf: Shelf, lengths: Rows[int], before: Part | None = None
) -> Part:
    """The step that ``rows`` have reserved, ``lengths`` new tokens each, for the layers of a
    shelf.

    before: an earlier step in this shelf. A step of one more token in each of the same pages
    follows from it, which is less work than a plan of its own.
    """
    device = shelf.store.device
    working = find_working(rows, device)
    tables = pages, near, first_pages = tables_of(rows, shelf, working)
    contexts = [each.length + each.reserved for each in rows]
    if before is not None and working is before.working is None and tables == before.tables:
        batch = one_more(before.batch)
        if batch is not None and (batch.query_lens, batch.host_context_lens) == (
            tuple(lengths),
            tuple(contexts),
        ):
            return Part(batch, None, before.tables)
    batch = plan_batch(
        lengths,
        contexts,
        pages,
        shelf.page_size,
        device,
        None if shelf.exact_pool is None else near,
        first_pages,
    )
    kept = [[*each] for each in pages], [[*each] for each in near], first_pages
    return Part(batch, working, kept)


def tables_of(rows: Rows[Sequence], shelf: Shelf, working: Working | None) -> Tables:
    """The pages that a step of ``rows`` reads and writes."""
    codes, exact = (None, None) if working is None else (working.codes, working.exact)
    pages = [each.pages for each in rows] if codes is None else codes.tables
    near = [each.exact_pages for each in rows] if exact is None else exact.tables
    if not shelf.reach.limited:
        return pages, near, None
    # What a window has left is hidden, but a kernel may load it before: it has to be readable.
    readable = [[max(page, 0) for page in table] for table in pages]
    near = [_with_ends(*each) for each in zip(rows, near, strict=True)]
    return readable, near, [first_there(each) for each in pages]


def first_there(pages: Rows[int]) -> int:
    """Logical page after the last that was given back."""
    return 1 + max((at for at, page in enumerate(pages) if page < 0), default=-1)


def _with_ends(row: Sequence, table: Rows[int]) -> list[int]:
    """Exact pages of a row, of which kernels load the first and the one before the next token's
    even where a window has left them."""
    ends = {0, row.length // row.page_size - 1}
    return [0 if page < 0 and at in ends else page for at, page in enumerate(table)]
