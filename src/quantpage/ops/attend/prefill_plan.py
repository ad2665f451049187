"""What a dense prefill does with its workspace: which keys it holds when, which tile runs first.

A pass fills the workspace with the keys of some requests for some kv_heads and runs attention over
it. Everything fits in one pass until the workspace's cap is reached; then

- many query tiles: passes over kv_heads, as each result is final and the card stays full;
- few query tiles on a long context (a chunk at its end): passes over segments of keys, each
  carrying the rows' running maximum, sum and output in float32.

Workspace rows of a request, in tiles of ``key_tile`` keys:

    [ sink tiles: keys 0 ..) [ keys base .. end ) [ zeros up to the tile's end )

base is 0 without a window, otherwise the first key that any query's window shows. Rows past the
context are zeros: a probability of 0 times what lies there must be 0.

This module is host arithmetic (numpy); nothing here touches a device.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

MAX_CONTEXT_BYTES = 64 * 2**20
"""Default cap of the workspace (K and V together)."""


SECTION_BYTES = 32 * 2**20
"""K and V of the heads that run at the same time: they should stay in a 50 MB L2."""
_FIXED_COST = 1.5
"""Key tiles' worth of a tile's queries, first keys and output."""


@dataclass(frozen=True, slots=True)
class DenseTile:
    """The kernel's tile: rows of (token, head of the group) pairs by keys."""

    rows: int
    keys: int
    stages: int
    """K and V tiles in flight."""


@dataclass(frozen=True, slots=True)
class DenseShape:
    """What the plan needs to know beside the batch's lengths."""

    kv_heads: int
    group: int
    row_bytes: int
    """Of one key and its value in the workspace."""
    tile: DenseTile
    window: int | None = None
    sink_tokens: int = 0
    cap: int = MAX_CONTEXT_BYTES
    processors: int = 132

    @property
    def sink_tiles(self) -> int:
        """Key tiles that hold the sink tokens; 0 without a window (they are keys like any)."""
        return 0 if self.window is None else -(-self.sink_tokens // self.tile.keys)


@dataclass(frozen=True, slots=True)
class DensePass:
    """One filling of the workspace and one launch over it."""

    head0: int
    heads: int
    rows: int
    """Workspace rows a head."""
    spans: np.ndarray
    """int32 [n, 5]: request, first key, keys to write, end of visible keys, first row (gather)."""
    max_span: int
    """Most keys to write of one span."""
    work: np.ndarray
    """int32 [items, 8]: see gluon_prefill_kernel.WORK_FIELDS."""
    order: np.ndarray
    """int32 [rounds, programs]: item * heads + head that a program takes in a round, or -1."""
    carried: bool
    """True: rows start from an earlier pass's float32 partials."""
    final: bool
    """False: rows end as float32 partials for the next pass."""


@lru_cache(maxsize=32)
def plan_passes(
    query_lens: tuple[int, ...], context_lens: tuple[int, ...], shape: DenseShape
) -> tuple[DensePass, ...]:
    """The passes of one step, in order. Requests without new tokens take none."""
    requests = [r for r, new in enumerate(query_lens) if new]
    extents = {r: _extent(query_lens[r], context_lens[r], shape) for r in requests}
    cap_rows = max(shape.tile.keys, shape.cap // (shape.kv_heads * shape.row_bytes))
    passes: list[DensePass] = []
    for members in _grouped(requests, extents, cap_rows):
        rows = sum(extents[r][1] for r in members)
        if rows <= cap_rows:
            whole = [(r, extents[r][0], context_lens[r]) for r in members]
            passes.append(_one_pass(whole, query_lens, context_lens, shape, (0, shape.kv_heads)))
        else:
            (request,) = members
            passes += _long_request(request, query_lens, context_lens, shape, extents[request])
    return tuple(passes)


def _extent(new: int, context: int, shape: DenseShape) -> tuple[int, int]:
    """First key after the sink tiles, and workspace rows, of one request."""
    keys = shape.tile.keys
    base = 0
    if shape.window is not None:
        base = max(0, context - new - shape.window + 1) // keys * keys
        base = max(base, shape.sink_tiles * keys)
    rows = shape.sink_tiles * keys + -(-max(context - base, 1) // keys) * keys
    return base, rows


def _grouped(requests, extents, cap_rows):
    """Runs of requests whose rows fit together; one that does not fit is alone."""
    members: list[int] = []
    rows = 0
    for request in requests:
        if members and rows + extents[request][1] > cap_rows:
            yield members
            members, rows = [], 0
        members.append(request)
        rows += extents[request][1]
    if members:
        yield members


def _long_request(request, query_lens, context_lens, shape, extent):
    """One request whose keys exceed the cap, by kv_heads or by segments of keys."""
    base, rows = extent
    context = context_lens[request]
    heads = shape.cap // (rows * shape.row_bytes)
    items = -(-query_lens[request] * shape.group // shape.tile.rows)
    # Under four rounds of tiles a pass over few heads leaves processors idle at its end.
    if (heads >= 1 and heads * items >= 4 * shape.processors) or shape.window is not None:
        heads = max(heads, 1)
        count = -(-shape.kv_heads // heads)
        heads = -(-shape.kv_heads // count)
        return [
            _one_pass(
                [(request, base, context)],
                query_lens,
                context_lens,
                shape,
                (head, min(heads, shape.kv_heads - head)),
            )
            for head in range(0, shape.kv_heads, heads)
        ]
    keys = shape.tile.keys
    count = -(-rows * shape.kv_heads * shape.row_bytes // shape.cap)
    step = -(-rows // (count * keys)) * keys
    starts = range(0, context, step)
    return [
        _one_pass(
            [(request, start, min(start + step, context))],
            query_lens,
            context_lens,
            shape,
            (0, shape.kv_heads),
            carried=start > 0,
            final=start + step >= context,
        )
        for start in starts
    ]


def _one_pass(
    held, query_lens, context_lens, shape: DenseShape, heads, carried=False, final=True
) -> DensePass:
    """held: (request, first key after the sink tiles, end of keys) of each request."""
    keys, sink_rows = shape.tile.keys, shape.sink_tiles * shape.tile.keys
    firsts = np.concatenate([[0], np.cumsum(query_lens)])
    spans, work, row = [], [], 0
    for request, base, end in held:
        new, context = query_lens[request], context_lens[request]
        length = -(-max(end - base, 1) // keys) * keys
        hidden = _hidden_keys(new, context, shape)
        if sink_rows:
            spans += _spans(request, (0, sink_rows), context, hidden, row)
        spans += _spans(request, (base, base + length), end, hidden, row + sink_rows)
        work.append(_work_items(int(firsts[request]), new, context, (row, base, end), shape))
        row += sink_rows + length
    items = np.concatenate(work)
    return DensePass(
        head0=heads[0],
        heads=heads[1],
        rows=row,
        spans=np.asarray(spans, dtype=np.int32),
        max_span=max(span[2] for span in spans),
        work=items.astype(np.int32),
        order=schedule(items[:, 7] / keys, heads[1], shape.processors, row * shape.row_bytes),
        carried=carried,
        final=final,
    )


def _hidden_keys(new: int, context: int, shape: DenseShape) -> tuple[int, int]:
    """Half-open range between the sink tokens and the first query's window: nobody sees it."""
    if shape.window is None:
        return 0, 0
    return shape.sink_tokens, max(shape.sink_tokens, context - new - shape.window + 1)


def _spans(request, held, end, hidden, row):
    """Spans that fill workspace rows with keys held[0]..held[1], zeros where they are hidden.

    Hidden keys may lie in pages that were freed and hold anything: they are never read.
    """
    first, last = held
    cuts = sorted({first, last, *(cut for cut in hidden if first < cut < last)})
    spans = []
    for low, high in pairwise(cuts):
        visible_end = 0 if hidden[0] <= low < hidden[1] else end
        spans.append((request, low, high - low, visible_end, row + low - first))
    return spans


def schedule(cost: np.ndarray, heads: int, programs: int, head_bytes: int) -> np.ndarray:
    """Who computes which (item, head), in which round: int32 [rounds, programs], -1 for none.

    Heads are taken in sections whose keys stay in the L2 together, longest items first. Each round
    gives its longest item to the program with the least work so far. An item longer than half a
    program's share goes before all sections, so that none is left for the end.
    """
    cost = cost + _FIXED_COST
    section = np.arange(heads) // max(1, SECTION_BYTES // head_bytes)
    item = np.repeat(np.arange(len(cost)), heads)
    head = np.tile(np.arange(heads), len(cost))
    giant = cost > 0.5 * cost.sum() * heads / programs
    rank = np.lexsort((head, item, -cost[item], np.where(giant[item], -1, section[head])))
    tiles, weight = (item * heads + head)[rank], cost[item][rank]
    programs = min(programs, len(tiles))
    rounds = -(-len(tiles) // programs)
    pad = rounds * programs - len(tiles)
    tiles = np.concatenate([tiles, np.full(pad, -1)]).reshape(rounds, programs)
    weight = np.concatenate([weight, np.zeros(pad)]).reshape(rounds, programs)
    order = np.empty((rounds, programs), dtype=np.int32)
    load = np.zeros(programs)
    for turn in range(rounds):
        idle_first = np.argsort(load, kind="stable")
        longest_first = np.argsort(-weight[turn], kind="stable")
        order[turn, idle_first] = tiles[turn, longest_first]
        load[idle_first] += weight[turn, longest_first]
    return order


def _work_items(token0, new, context, held, shape: DenseShape) -> np.ndarray:
    row, base, end = held
    first_rows = np.arange(0, new * shape.group, shape.tile.rows)
    last = np.minimum(first_rows + shape.tile.rows - 1, new * shape.group - 1) // shape.group
    position = context - new
    # What a causal tile costs, in keys; only the order depends on it.
    low = base
    if shape.window is not None:
        low = np.maximum(base, position + first_rows // shape.group - shape.window + 1)
    cost = np.clip(np.minimum(position + last + 1, end) - low, 0, None)
    items = np.empty((len(first_rows), 8), dtype=np.int64)
    for field, value in enumerate((token0, new, position, first_rows, row, base, end, cost)):
        items[:, field] = value
    return items
