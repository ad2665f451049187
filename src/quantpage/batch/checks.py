"""What the tensors of a step may hold, as numpy on the host: BatchPlan asks when it is built.

Each check is a few operations on arrays of requests, tokens or table entries, and says of the
first wrong number where it is, what was expected and what came.
"""

from collections.abc import Sequence
from operator import index

import numpy as np

INT32_END = 2**31

Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""New tokens and contexts a request; owner and position a token; first page a request. int64."""


def whole_numbers(name: str, given: Sequence[int]) -> tuple[int, ...]:
    """``given`` as a tuple of Python integers; ValueError for anything else."""
    try:
        return tuple(map(index, given))
    except TypeError:
        raise ValueError(f"{name}: expected whole numbers, got {given!r}") from None


def table_rows(
    name: str, tables: Sequence[Sequence[int]], contexts: Sequence[int], page_size: int, fill: int
) -> np.ndarray:
    """int32 [requests, max_pages] of page tables, ``fill`` behind their ends; ValueError for those
    that are too short for their contexts or hold no page ids.
    """
    for row, (table, context) in enumerate(zip(tables, contexts, strict=True)):
        if len(table) * page_size < context:
            raise ValueError(
                f"{name}[{row}]: expected {-(-context // page_size)} pages for {context} tokens, "
                f"got {len(table)}"
            )
    width = max([1, *map(len, tables)])
    rows = np.full((len(tables), width), fill, dtype=np.int32)
    for row, table in enumerate(tables):
        if not len(table):
            continue
        given = np.asarray(table)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise ValueError(f"{name}[{row}]: expected whole numbers, got {table!r}")
        used = given[: -(-contexts[row] // page_size)]
        if fill == 0 and used.size and used.min() < 0:
            raise ValueError(f"{name}[{row}]: expected page ids of at least 0, got {table}")
        if given.min() < -1 or given.max() >= INT32_END:
            raise ValueError(f"{name}[{row}]: expected page ids from -1 to 2^31 - 1, got {table}")
        rows[row, : len(given)] = given
    return rows


def places_of(new: np.ndarray, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner and position of each new token, when ``new`` tokens end contexts."""
    owners = np.repeat(np.arange(len(new)), new)
    firsts = np.cumsum(new) - new
    return owners, np.arange(len(owners)) + (contexts - new - firsts)[owners]


def check_lengths(
    starts: np.ndarray, contexts: np.ndarray, new: np.ndarray, host: tuple[int, ...]
) -> bool:
    """Whether the host's contexts are bounds that the device's stay below somewhere."""
    wanted = np.concatenate([[0], np.cumsum(new)])
    _refuse("query_starts", starts != wanted, starts, "the sums of query_lens, {}", wanted)
    bounds = np.array(host, dtype=np.int64)
    bad = (contexts > bounds) | (contexts < new)
    _refuse("context_lens", bad, contexts, "at most the host's {}, and the new tokens", bounds)
    return bool((contexts < bounds).any())


def check_positions(positions: np.ndarray, new: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """Owner of each token."""
    owners, wanted = places_of(new, contexts)
    _refuse("positions", positions != wanted, positions, "{}, context - new + i", wanted)
    return owners


def check_page_table(table: np.ndarray, slots: np.ndarray, step: Step, page_size: int) -> int:
    """The largest page id of the step."""
    inside, held = _inside(table, step, page_size)
    _refuse("page_table", inside & (table < 0), table, "page ids of at least 0 in the context")
    _check_slots("page_table", "slots", (table, held, slots), step, page_size)
    return int(table.max(where=inside, initial=-1))


def check_exact_table(table: np.ndarray, slots: np.ndarray, step: Step, page_size: int) -> int:
    """The largest exact page id of the step; the pages that its queries see exactly are there."""
    new, contexts, _, _, _ = step
    pages = np.arange(table.shape[1])
    inside, there = _inside(table, step, page_size)
    _refuse("exact.page_table", inside & (table < -1), table, "exact page ids, or -1")
    first = np.maximum((contexts - new) // page_size - 1, 0)[:, None]
    needed = there & (new > 0)[:, None] & ((pages >= first) | (pages == 0))
    _refuse(
        "exact.page_table",
        needed & (table < 0),
        table,
        "an exact page: queries see a request's first page, their own and the one before exactly",
    )
    held = there & (table >= 0)
    _check_slots("exact.page_table", "exact.slots", (table, held, slots), step, page_size)
    return int(table.max(where=inside, initial=-1))


def _inside(table: np.ndarray, step: Step, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries that stand for a context's pages, and those of them that were not given back.

    What was given back may be anything that can be read: a kernel may load it before it hides it.
    """
    _, contexts, _, _, first = step
    pages = np.arange(table.shape[1])
    inside = pages < -(-contexts // page_size)[:, None]
    return inside, inside & (pages >= first[:, None])


def _check_slots(
    table_name: str,
    name: str,
    given: tuple[np.ndarray, np.ndarray, np.ndarray],
    step: Step,
    page_size: int,
) -> None:
    """Slots are where the table puts their tokens, and nobody else holds a page that is written."""
    table, held, slots = given
    _, _, owners, positions, _ = step
    logical = positions // page_size
    pages = table[owners, logical].astype(np.int64)
    wanted = np.where(pages < 0, -1, pages * page_size + positions % page_size)
    _refuse(name, (slots != wanted) & (slots != -1), slots, "{}, or -1 to skip it", wanted)
    written = np.zeros(table.shape, dtype=bool)
    kept = slots >= 0
    written[owners[kept], logical[kept]] = True
    pages_written, entries = table[written], np.sort(table[held])
    holders = np.searchsorted(entries, pages_written, "right")
    holders -= np.searchsorted(entries, pages_written, "left")
    if (holders > 1).any():
        written[written] = holders > 1
        _refuse(table_name, written, table, "a page that nobody else holds, as the step writes it")


def _refuse(
    name: str,
    bad: np.ndarray,
    given: np.ndarray,
    expected: str,
    wanted: np.ndarray | None = None,
) -> None:
    """ValueError at the first True of ``bad``; {} of ``expected`` is what was wanted there."""
    if not bad.any():
        return
    at = tuple(int(each) for each in np.argwhere(bad)[0])
    said = expected if wanted is None else expected.format(int(wanted[at]))
    where = ", ".join(map(str, at))
    raise ValueError(f"{name}[{where}]: expected {said}; got {int(given[at])}")
