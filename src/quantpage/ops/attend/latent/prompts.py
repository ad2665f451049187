"""Which program multiplies which keys of a prompt's query rows: host arithmetic (numpy).

A row here is a tile of query rows, tokens times heads; it sees the keys up to its last token's, so
that a fresh prompt's rows differ in length and a mixed step's even more. Where there are too few of
them for a device, or one is much longer than the rest, rows are cut into pieces that another launch
joins. Pieces go to programs longest first, each to the program that has least to do.
"""

import heapq
from dataclasses import dataclass

import numpy as np

FIELDS = (
    "request",
    "first token's place in the step",
    "keys up to its last token's",
    "tokens",
    "first head of the first token",
    "first tile of keys",
    "end of them",
    "slot of its partial result, -1: it is the whole row",
)
"""int32 each, of a piece. Its row's first token need not have all of its heads there."""
CUT_FIELDS = ("slot of the first piece", "pieces", "request", "first query row of the request")
"""int32 each, of a row that was cut. Its pieces' slots follow each other."""
ROW_COST = 8.0
"""Tiles in whose time a piece begins and ends: queries, first keys, output."""
MIN_TILES = 8
"""Smallest piece of a row."""


@dataclass(frozen=True, slots=True)
class PromptShape:
    """What a plan depends on beside lengths."""

    heads: int
    rows: int
    """Query rows of a tile."""
    tile: int
    """Keys of a tile."""
    programs: int
    causal: bool = True
    window: int | None = None
    sink_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Pieces in the order of their programs."""

    pieces: np.ndarray
    """int32 [pieces, len(FIELDS)]."""
    starts: np.ndarray
    """int32 [programs + 1]: program p has the pieces starts[p] .. starts[p + 1]."""
    cuts: np.ndarray
    """int32 [rows that were cut, len(CUT_FIELDS)]."""
    slots: int
    """Partial results of all cut rows."""


def plan_prompts(
    query_lens: tuple[int, ...], context_lens: tuple[int, ...], shape: PromptShape
) -> PromptPlan:
    """Pieces of all new tokens of a step."""
    rows = _rows_of(query_lens, context_lens, shape)
    tiles = _tiles_of(rows[:, 2], rows[:, 3], shape)
    pieces = _cut(tiles, shape.programs)
    each = -(-tiles // pieces)
    pieces = -(-tiles // each)
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = pieces > 1
    slots = np.cumsum(np.where(cut, pieces, 0))
    table = np.repeat(rows, pieces, axis=0)
    first = nth * np.repeat(each, pieces)
    end = np.minimum(first + np.repeat(each, pieces), np.repeat(tiles, pieces))
    slot = np.where(np.repeat(cut, pieces), np.repeat(slots - pieces, pieces) + nth, -1)
    table = np.column_stack([table[:, :5], first, end, slot])
    of, _ = _assign(end - first + ROW_COST, shape.programs)
    order = np.argsort(of, kind="stable")
    starts = np.searchsorted(of[order], np.arange(shape.programs + 1))
    cuts = np.column_stack([slots - pieces, pieces, rows[:, 0], rows[:, 5]])[cut]
    return PromptPlan(
        table[order].astype(np.int32),
        starts.astype(np.int32),
        cuts.astype(np.int32),
        int(slots[-1]) if len(slots) else 0,
    )


def _rows_of(
    query_lens: tuple[int, ...], context_lens: tuple[int, ...], shape: PromptShape
) -> np.ndarray:
    """[tiles of query rows, 6]: the first five of FIELDS, and the first query row."""
    made, begin = [np.zeros((0, 6), np.int64)], 0
    for request, (new, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        first_row = np.arange(0, new * shape.heads, shape.rows)
        first = first_row // shape.heads
        last = np.minimum((first_row + shape.rows - 1) // shape.heads, new - 1)
        seen = context - new + last + 1 if shape.causal else np.full_like(first, context)
        row = np.full_like(first, request)
        made.append(
            np.column_stack(
                [row, begin + first, seen, last - first + 1, first_row % shape.heads, first_row]
            )
        )
        begin += new
    return np.concatenate(made)


def _tiles_of(context: np.ndarray, new: np.ndarray, shape: PromptShape) -> np.ndarray:
    """Tiles of keys that rows see: triton_share's key_ranges and tile_ranges for all keys."""
    low = np.zeros_like(context)
    if shape.window is not None:
        low = np.maximum(context - new - shape.window + 1, 0)
    a_tiles = -(-np.minimum(shape.sink_tokens, low) // shape.tile)
    first = np.maximum(low // shape.tile, a_tiles)
    return a_tiles + np.maximum(-(-context // shape.tile) - first, 0)


def _cut(tiles: np.ndarray, programs: int) -> np.ndarray:
    """Pieces of each row: those by which the programs are done first."""
    whole = np.ones_like(tiles)
    if not len(tiles) or len(tiles) >= 4 * programs:
        return whole
    tries = [whole]
    for turns in (1, 2, 3):
        tries.append(np.rint(tiles * programs * turns / tiles.sum()).astype(np.int64))
    rest = len(tiles) % programs
    if rest:
        # All but as many rows as fill programs once or more.
        last = np.argsort(-tiles, kind="stable")[-rest:]
        tries.append(whole.copy())
        tries[-1][last] = programs // rest
    best, pieces = np.inf, whole
    for made in tries:
        made = np.clip(made, 1, np.maximum(tiles // MIN_TILES, 1))
        slots = made[made > 1].sum()
        # Another launch joins what was cut.
        done = _assign(np.repeat(tiles / made, made) + ROW_COST, programs)[1]
        done += ROW_COST / 2 * (slots > 0)
        if done < best and slots <= 2 * programs:
            best, pieces = done, made
    return pieces


def _assign(cost: np.ndarray, programs: int) -> tuple[np.ndarray, float]:
    """The program of each piece, and when the last of them is done."""
    order = np.argsort(-cost, kind="stable")
    of = np.zeros(len(cost), np.int64)
    if len(cost) > 8 * programs:
        # So many differ little from their neighbours: dealt out, back and forth.
        turn, place = np.divmod(np.arange(len(cost)), programs)
        of[order] = np.where(turn % 2 == 0, place, programs - 1 - place)
    else:
        done = [(0.0, program) for program in range(programs)]
        for piece in order:
            busy, program = done[0]
            heapq.heapreplace(done, (busy + float(cost[piece]), program))
            of[piece] = program
    return of, float(np.bincount(of, cost, programs).max())
