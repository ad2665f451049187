"""What a prefill step launches: which keys a workspace holds when, which tile runs where and when.

A pass fills the workspace with the keys of some requests for some kv_heads and runs attention over
it. Everything fits in one pass until the workspace's cap is reached; then

- many query tiles: passes over kv_heads, as each result is final and the card stays full;
- few query tiles on a long context (a chunk at its end): passes over segments of keys, each
  carrying the rows' output and log-sum-exp in float32.

Workspace rows of a request, in tiles of ``tile.keys`` keys:

    [ sink tiles: keys 0 ..) [ keys base .. end ) [ zeros up to the tile's end )

base is 0 without a window, otherwise the first key that any query's window shows. Rows past the
context are zeros: a probability of 0 times what lies there must be 0.

When a step has fewer tiles than the card has processors, each row's keys are split into parts that
run side by side and are merged by log-sum-exp.

Exact pages lie in the same workspace: a request's first page in place of its codes, as every query
sees it so, and the pages that are near to some query in rows of their own behind all codes. The
latter are read where a request's keys begin: in the first of its passes over keys, by the first of
its parts.

This module is host arithmetic (numpy); nothing here touches a device.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from quantpage.ops.attend.flash.tiles import WORKSPACE_BYTES, DenseTile
from quantpage.ops.attend.params import NEAR_PAGES

SECTION_BYTES = 32 * 2**20
"""K and V of the heads that run at the same time: they should stay in a 50 MB L2."""
MAX_PARTS = 8
WORK_FIELDS = (
    "token row",
    "new tokens",
    "position of the first",
    "first packed row",
    "workspace row",
    "key of that row",
    "end of keys",
    "request",
    "part",
)
"""int32 each, of a work item: a tile of one request's packed rows and a range of its keys."""
_FIXED_COST = 1.5
"""Key tiles' worth of a tile's queries, first keys and output."""


@dataclass(frozen=True, slots=True)
class DenseShape:
    """What the plan needs to know beside the batch's lengths."""

    kv_heads: int
    group: int
    row_bytes: int
    """Of one key and its value as the kernel reads them."""
    tile: DenseTile
    window: int | None = None
    sink_tokens: int = 0
    cap: int = WORKSPACE_BYTES
    processors: int = 132
    persistent: bool = True
    """Programs take tiles in rounds, and rows can start from an earlier pass's partials."""
    exact_page: int = 0
    """Keys of a page, where the workspace holds exact pages too; 0: codes alone."""

    @property
    def sink_tiles(self) -> int:
        """Key tiles that hold the sink tokens; 0 without a window (they are keys like any)."""
        return 0 if self.window is None else -(-self.sink_tokens // self.tile.keys)


@dataclass(frozen=True, slots=True)
class Work:
    """One launch: its tiles, and who takes them."""

    items: np.ndarray
    """int32 [items, len(WORK_FIELDS)]."""
    order: np.ndarray
    """int32 [rounds, programs]: item * heads + head that a program takes in a round, or -1."""
    parts: int
    """Partial results a row; 1: final."""


@dataclass(frozen=True, slots=True)
class ExactRows:
    """Where a workspace holds exact pages."""

    spans: np.ndarray
    """As ``DensePass.spans``, over tables of exact pages; written after those."""
    max_span: int
    near: np.ndarray | None
    """int32 [requests]: workspace row of each request's near pages, 0 of requests of other passes;
    None: an earlier pass has them."""


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
    work: Work
    carried: bool
    """True: rows start from an earlier pass's float32 partials."""
    final: bool
    """False: rows end as float32 partials for the next pass."""
    exact: ExactRows | None = None
    """None: the launch reads codes alone."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Keys of one request in a workspace: base .. end, from ``row`` on, after the sink tiles."""

    request: int
    base: int
    end: int
    row: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """The lengths of a step and the row of each request's first token."""

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]

    @property
    def firsts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.query_lens)])


@lru_cache(maxsize=32)
def plan_passes(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    shape: DenseShape,
    members: tuple[int, ...] | None = None,
) -> tuple[DensePass, ...]:
    """The passes of one step over a workspace, in order.

    members: the requests to compute; None: all that have new tokens.
    """
    step = _Step(query_lens, context_lens)
    requests = _chosen(query_lens, members)
    extents = {r: _extent(query_lens[r], context_lens[r], shape) for r in requests}
    cap_rows = max(shape.tile.keys, shape.cap // (shape.kv_heads * shape.row_bytes))
    runs = list(_grouped(requests, extents, cap_rows))
    passes: list[DensePass] = []
    for run in runs:
        if sum(extents[r][1] for r in run) <= cap_rows:
            held = [_Held(r, extents[r][0], context_lens[r]) for r in run]
            split = members is None and len(runs) == 1
            passes.append(_one_pass(held, step, shape, (0, shape.kv_heads), split=split))
        else:
            (request,) = run
            passes += _long_request(request, step, shape, extents[request])
    return tuple(passes)


@lru_cache(maxsize=32)
def plan_pages(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    shape: DenseShape,
    members: tuple[int, ...] | None = None,
) -> Work:
    """The work of a kernel that reads pages itself, one program a tile."""
    step = _Step(query_lens, context_lens)
    requests = _chosen(query_lens, members)
    held = [_Held(r, 0, context_lens[r]) for r in requests]
    keys = sum(context_lens[r] for r in requests)
    return _work(held, step, shape, shape.kv_heads, keys, split=members is None)


def schedule(cost: np.ndarray, heads: int, programs: int, head_bytes: int) -> np.ndarray:
    """Who computes which (item, head), in which round: int32 [rounds, programs], -1 for none.

    Heads are taken in sections whose keys stay in the L2 together, longest items first. Each round
    gives its longest item to the program with the least work so far. An item longer than half a
    program's share goes before all sections, so that none is left for the end.
    """
    cost = cost + _FIXED_COST
    section = np.arange(heads) // max(1, SECTION_BYTES // max(1, head_bytes))
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


def _chosen(query_lens: tuple[int, ...], members: tuple[int, ...] | None) -> list[int]:
    wanted = range(len(query_lens)) if members is None else members
    return [request for request in wanted if query_lens[request]]


def _extent(new: int, context: int, shape: DenseShape) -> tuple[int, int]:
    """First key after the sink tiles, and workspace rows, of one request."""
    keys = shape.tile.keys
    base = 0
    if shape.window is not None:
        base = max(0, context - new - shape.window + 1) // keys * keys
        base = max(base, shape.sink_tiles * keys)
    rows = shape.sink_tiles * keys + -(-max(context - base, 1) // keys) * keys
    return base, rows + _exact_rows(new, context, shape)


def _exact_rows(new: int, context: int, shape: DenseShape) -> int:
    """Workspace rows of one request's near pages."""
    return context - _near_key(new, context, shape.exact_page) if shape.exact_page else 0


def _near_key(new: int, context: int, page: int) -> int:
    """First key that is near to some query."""
    return max((context - new) // page - NEAR_PAGES, 0) * page


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


def _long_request(request: int, step: _Step, shape: DenseShape, extent) -> list[DensePass]:
    """One request whose keys exceed the cap, by kv_heads or by segments of keys."""
    base, rows = extent
    context = step.context_lens[request]
    heads = shape.cap // (rows * shape.row_bytes)
    items = -(-step.query_lens[request] * shape.group // shape.tile.rows)
    # Under four rounds of tiles a pass over few heads leaves processors idle at its end.
    busy = heads >= 1 and heads * items >= 4 * shape.processors
    exact = _exact_rows(step.query_lens[request], context, shape)
    # A segment has whatever exact pages there are: beside many it would be short.
    crowded = 2 * exact > shape.cap // (shape.kv_heads * shape.row_bytes)
    if busy or crowded or shape.window is not None or not shape.persistent:
        count = -(-shape.kv_heads // max(heads, 1))
        heads = -(-shape.kv_heads // count)
        held = [_Held(request, base, context)]
        return [
            _one_pass(held, step, shape, (head, min(heads, shape.kv_heads - head)))
            for head in range(0, shape.kv_heads, heads)
        ]
    keys = shape.tile.keys
    rows -= exact
    # Whole tiles under the cap, and then no more segments than that takes, of one length.
    most = max(1, (shape.cap // (shape.kv_heads * shape.row_bytes) - exact) // keys) * keys
    count = -(-rows // most)
    length = -(-rows // (count * keys)) * keys
    return [
        _one_pass(
            [_Held(request, start, min(start + length, context))],
            step,
            shape,
            (0, shape.kv_heads),
            carried=start > 0,
            final=start + length >= context,
        )
        for start in range(0, context, length)
    ]


def _one_pass(
    wanted: list[_Held],
    step: _Step,
    shape: DenseShape,
    heads: tuple[int, int],
    carried: bool = False,
    final: bool = True,
    split: bool = False,
) -> DensePass:
    keys, sink_rows = shape.tile.keys, shape.sink_tiles * shape.tile.keys
    spans, held, row = [], [], 0
    for each in wanted:
        new, context = step.query_lens[each.request], step.context_lens[each.request]
        length = -(-max(each.end - each.base, 1) // keys) * keys
        hidden = _hidden_keys(new, context, shape)
        if sink_rows:
            spans += _spans(each.request, (0, sink_rows), context, hidden, row)
        shown = (each.base, each.base + length)
        spans += _spans(each.request, shown, each.end, hidden, row + sink_rows)
        held.append(_Held(each.request, each.base, each.end, row))
        row += sink_rows + length
    work = _work(held, step, shape, heads[1], row, split)
    exact = None
    if shape.exact_page:
        exact, row = _exact(held, step, shape, row, not carried)
    return DensePass(
        head0=heads[0],
        heads=heads[1],
        rows=row,
        spans=np.asarray(spans, dtype=np.int32),
        max_span=max(span[2] for span in spans),
        work=work,
        carried=carried,
        final=final,
        exact=exact,
    )


def _exact(
    held: list[_Held], step: _Step, shape: DenseShape, end: int, near: bool
) -> tuple[ExactRows, int]:
    """Exact pages of the requests in ``held``, near ones from workspace row ``end`` on, and the
    workspace's new end. near: whether this pass has them."""
    page, sink_rows = shape.exact_page, shape.sink_tiles * shape.tile.keys
    spans = []
    rows = np.zeros(len(step.query_lens), dtype=np.int32)
    for each in held:
        request, context = each.request, step.context_lens[each.request]
        if sink_rows:
            spans.append((request, 0, min(page, sink_rows), context, each.row))
        last = min(page, each.end)
        if each.base < last:
            spans.append((request, each.base, last - each.base, context, each.row + sink_rows))
        if near:
            key = _near_key(step.query_lens[request], context, page)
            spans.append((request, key, context - key, context, end))
            rows[request] = end
            end += context - key
    made = np.asarray(spans, dtype=np.int32).reshape(-1, 5)
    most = int(made[:, 2].max(initial=0))
    return ExactRows(made, most, rows if near else None), end


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


def _work(
    held: list[_Held], step: _Step, shape: DenseShape, heads: int, rows: int, split: bool
) -> Work:
    """Tiles of all requests in ``held``, whose keys take ``rows`` rows a head."""
    made = [_items(each, step, shape) for each in held]
    items = np.concatenate([each[0] for each in made])
    cost = np.concatenate([each[1] for each in made]) / shape.tile.keys
    parts = 1
    if split and shape.window is None:
        parts = _parts(len(items) * heads, float(cost.max()), shape.processors)
    programs = shape.processors if shape.persistent else len(items) * heads * parts
    if parts > 1:
        items, cost = _split(items, parts, shape.tile.keys)
    order = schedule(cost, heads, programs, rows * shape.row_bytes)
    return Work(items.astype(np.int32), order, parts)


def _parts(tiles: int, longest: float, processors: int) -> int:
    """How often to split keys: the card about full, and at least 8 key tiles a part."""
    return int(max(1, min(MAX_PARTS, processors // tiles, longest // 8)))


def _split(items: np.ndarray, parts: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Every item once a part, over equal ranges of its request's keys."""
    base, end = items[:, 5], items[:, 6]
    length = -(-np.maximum(end - base, 1) // (keys * parts)) * keys
    made = []
    for part in range(parts):
        piece = items.copy()
        piece[:, 4] += part * length
        piece[:, 5] = base + part * length
        piece[:, 6] = np.minimum(base + (part + 1) * length, end)
        # A part past the end keeps one tile, all of it masked, inside the request's rows.
        late = piece[:, 5] >= end
        piece[late, 4], piece[late, 5], piece[late, 6] = items[late, 4], base[late], base[late]
        piece[:, 8] = part
        made.append(piece)
    items = np.concatenate(made)
    return items, np.maximum(items[:, 6] - items[:, 5], 0) / keys


def _items(held: _Held, step: _Step, shape: DenseShape) -> tuple[np.ndarray, np.ndarray]:
    """One request's tiles, and what each costs in keys (causal: only the order depends on it)."""
    new, context = step.query_lens[held.request], step.context_lens[held.request]
    first_rows = np.arange(0, new * shape.group, shape.tile.rows)
    last = np.minimum(first_rows + shape.tile.rows - 1, new * shape.group - 1) // shape.group
    position = context - new
    low = held.base
    if shape.window is not None:
        low = np.maximum(held.base, position + first_rows // shape.group - shape.window + 1)
    cost = np.clip(np.minimum(position + last + 1, held.end) - low, 0, None)
    items = np.zeros((len(first_rows), len(WORK_FIELDS)), dtype=np.int64)
    first_token = int(step.firsts[held.request])
    items[:, 3] = first_rows
    items[:, :3] = (first_token, new, position)
    items[:, 4:8] = (held.row, held.base, held.end, held.request)
    return items, cost
