"""The rows of a batch in a file: the pages that they hold (cache/saved), and a note of who holds
which.

    length       tokens a row, padding counted
    kept         [rows][tokens] of 0 and 1, 0 where a token was padding; null: never padding
    tables       for each reach: its layers, and for each row its length, pages and exact pages

A page that a kernel is sent to comes from this note, so all of it is compared with the pages that
are there before a pool or a row exists.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantpage.cache import PagedKVCache, Reach, Sequence
from quantpage.cache.saved import SavedPages, write_pages
from quantpage.cache.tensor_file import Damaged, shown, whole_number
from quantpage.errors import CacheError
from quantpage.integrations.hf_transformers.pages.memory import Memory
from quantpage.integrations.hf_transformers.pages.rows import Rows

_NAMES = ("pages", "exact_pages")

SavedTables = dict[Reach, dict[str, Any]]
"""What a note says of each reach: its layers and rows."""


def save_rows(rows: Rows, path: Path | str, note: dict[str, Any]) -> None:
    """Write the rows and the pages that they hold to a file, whole or not at all.

    note: what to remember besides ``length``, ``kept`` and ``tables``.
    """
    rows.settle()
    planes: dict[str, Tensor] = {}
    counts: dict[int, tuple[int, int]] = {}
    tables = []
    for reach, sequences in rows.tables.items():
        shelf = rows.memory.shelves[reach]
        held = [sorted(each) for each in shelf.held(sequences)]
        planes |= shelf.store.to_save(*held)
        counts |= dict.fromkeys(shelf.store.layouts, (len(held[0]), len(held[1])))
        number, exact_number = ({page: at for at, page in enumerate(each)} for each in held)
        told = [
            {
                "length": each.length,
                "pages": [number.get(page, -1) for page in each.pages],
                "exact_pages": [exact_number.get(page, -1) for page in each.exact_pages],
            }
            for each in sequences
        ]
        tables.append(
            {
                "reach": [reach.window, reach.chunk],
                "layers": sorted(shelf.store.layouts),
                "rows": told,
            }
        )
    kept = None if rows.kept is None else rows.kept.int().tolist()
    note = {**note, "length": rows.length, "tables": tables, "kept": kept}
    write_pages(path, SavedPages(rows.memory.layouts, counts, planes, note))


def saved_rows(
    memory: Memory, saved: SavedPages, tables: SavedTables, device: torch.device
) -> Rows:
    """The rows that ``save_rows`` wrote, in a memory that holds nothing yet.

    tables: what ``saved_tables`` found.
    """
    kept = saved.note["kept"]
    stores = {}
    for reach, table in tables.items():
        store = PagedKVCache(*saved.counts[table["layers"][0]], device)
        store.fill({index: saved.layouts[index] for index in table["layers"]}, saved.planes)
        stores[reach] = store
    memory.fill(stores)
    made = Rows(memory)
    sequences = {
        reach: [memory.shelves[reach].new_sequence() for _ in table["rows"]]
        for reach, table in tables.items()
    }
    for reach, table in tables.items():
        shelf = memory.shelves[reach]
        for name, pool in zip(_NAMES, (shelf.pool, shelf.exact_pool), strict=True):
            if pool is None:
                continue
            # Every page of the file is held by some row: all are taken, shared, and let go
            # once.
            held = [pool.acquire() for _ in range(pool.free)]
            for sequence, row in zip(sequences[reach], table["rows"], strict=True):
                sequence.length = row["length"]
                pages = [page if page < 0 else pool.share(page) for page in row[name]]
                setattr(sequence, name, pages)
            for page in held:
                pool.release(page)
    made.hold(
        sequences,
        None if kept is None else torch.tensor(kept, dtype=torch.bool, device="cpu"),
        saved.note["length"],
    )
    return made


def saved_tables(memory: Memory, saved: SavedPages, layers: Mapping[int, Reach]) -> SavedTables:
    """The tables of a file's note by their reach, when all that the note says can be.

    layers: the reach of every layer. Raises Damaged for a note that ``save_rows`` cannot have
    written.
    """
    note = saved.note
    for name in ("length", "tables", "kept"):
        if name not in note:
            raise Damaged("expected the page tables of a cache, got pages without them")
    if not whole_number(note["length"], 1):
        raise Damaged(f"length: expected a number of tokens, got {shown(note['length'])}")
    tables: SavedTables = {}
    for table in _list("tables", note["tables"]):
        _names("tables", table, {"reach", "layers", "rows"})
        window = _list("reach", table["reach"])
        reach = next((x for x in memory.shelves if [x.window, x.chunk] == window), None)
        if reach is None or reach in tables or not all(map(whole_number, window)):
            raise Damaged(f"reach: expected one of the model's, once, got {shown(window)}")
        tables[reach] = table
        mine = _list("layers", table["layers"])
        wanted = sorted(index for index, each in layers.items() if each == reach)
        if mine != wanted or not all(map(whole_number, mine)):
            raise Damaged(f"layers of {reach}: expected {wanted}, got {shown(mine)}")
        if not saved.counts.keys() >= {*mine}:
            raise Damaged(f"expected layers {sorted(layers)}, got layers {sorted(saved.counts)}")
        if len({saved.counts[index] for index in mine}) != 1:
            raise Damaged(f"layers of {reach}: expected as many pages in each, got others")
    if set(tables) != set(memory.shelves):
        raise Damaged(f"tables: expected {len(memory.shelves)} reaches, got {len(tables)}")
    lengths = _lengths(note, {len(_list("rows", each["rows"])) for each in tables.values()})
    for reach, table in tables.items():
        _check_table(memory, reach, table["rows"], lengths, saved.counts[table["layers"][0]])
    return tables


def _lengths(note: Mapping[str, Any], counts: set[int]) -> list[int]:
    """Tokens of every row, padding left out."""
    length, kept = note["length"], note["kept"]
    if len(counts) != 1 or 0 in counts:
        raise Damaged(f"rows: expected as many in every table, got {sorted(counts)}")
    rows = counts.pop()
    if kept is None:
        return [length] * rows
    if len(_list("kept", kept)) != rows:
        raise Damaged(f"kept: expected {rows} rows, got {len(kept)}")
    for row in kept:
        if len(_list("kept", row)) != length or not all(whole_number(x, 0, 1) for x in row):
            raise Damaged(f"kept: expected rows of {length} times 0 or 1, got {shown(row)}")
    return [sum(row) for row in kept]


def _check_table(
    memory: Memory, reach: Reach, rows: list[Any], lengths: list[int], counts: tuple[int, int]
) -> None:
    """The pages of every row: of the file, at one place each, all of them, and none missing that
    a query sees."""
    shelf = memory.shelves[reach]
    # page -> the place in a row that it stands at; rows that share it are forks.
    places: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for row, length in zip(rows, lengths, strict=True):
        _names("rows", row, {"length", *_NAMES})
        if not whole_number(row["length"]) or row["length"] != length:
            raise Damaged(f"rows: expected {length} tokens, got {shown(row['length'])}")
        need = -(-length // memory.page_size)
        for at, name in enumerate(_NAMES):
            pages = _list(name, row[name])
            wanted = 0 if at and shelf.exact_pool is None else need
            if len(pages) != wanted:
                raise Damaged(f"{name}: expected {wanted} for {length} tokens, got {len(pages)}")
            for place, page in enumerate(pages):
                if not whole_number(page, -1, counts[at] - 1):
                    raise Damaged(f"{name}: expected -1 .. {counts[at] - 1}, got {shown(page)}")
                if page >= 0 and places[at].setdefault(page, place) != place:
                    raise Damaged(f"{name}: expected page {page} at one place, got it at two")
        _check_seen(shelf.new_sequence(), row)
    for at, name in enumerate(_NAMES):
        if len(places[at]) != counts[at]:
            raise Damaged(f"{name}: expected rows that hold {counts[at]}, got {len(places[at])}")


def _check_seen(sequence: Sequence, row: Mapping[str, Any]) -> None:
    # Never any pool's: looked at, and forgotten.
    sequence.length = row["length"]
    sequence.pages, sequence.exact_pages = row["pages"], row["exact_pages"]
    try:
        sequence.check_crop(row["length"])
    except CacheError as error:
        raise Damaged(f"rows: {error}") from error


def _names(name: str, given: Any, wanted: set[str]) -> None:
    if type(given) is not dict or set(given) != wanted:
        raise Damaged(f"{name}: expected {sorted(wanted)}, got {shown(given)}")


def _list(name: str, given: Any) -> list[Any]:
    if type(given) is not list:
        raise Damaged(f"{name}: expected a list, got {shown(given)}")
    return given
