"""Where a program is in the line of tiles, which keys its rows see, and how rows end: what the
Hopper kernels of decode and of latent rows share.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_share import (
    here,
    key_ranges,
    row_programs,
    same,
    shown_keys,
    tile_ranges,
    with_lead,
)
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS, EXACT_KEYS, exact_pairs
from quantpage.ops.triton.common import LOG2E


class Seen(NamedTuple):
    """A request and what its queries see; key ranges and their tiles as in triton_share."""

    context: Any
    q_start: Any
    q_len: Any
    a_low: Any
    a_high: Any
    b_low: Any
    b_high: Any
    a_first: Any
    a_tiles: Any
    b_first: Any
    tiles: Any
    """Of the whole row."""


class Piece(NamedTuple):
    """The tiles of one row that a program has."""

    seen: Any
    """Of its request."""
    item: Any
    """Which (kv_head, tile of query rows) of the request."""
    first_tile: Any
    last_tile: Any
    """As the first, where the program has nothing but what comes before the row."""
    row_start: Any
    """Where the row begins in the line."""


@gluon.jit
def seen_of(
    query_starts, context_lens, request, window, sink_tokens, PAGE: gl.constexpr,
    TILE: gl.constexpr, FULL: gl.constexpr, WINDOW: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """Of one request."""
    context = same(gl.load(context_lens + request))
    q_start = same(gl.load(query_starts + request))
    q_len = gl.minimum(same(gl.load(query_starts + request + 1)) - q_start, context)
    a_low, a_high, b_low, b_high = key_ranges(
        context, q_len, window, sink_tokens, PAGE, FULL, WINDOW, SEGMENT
    )
    a_first, a_tiles, b_first, b_tiles = tile_ranges(a_low, a_high, b_low, b_high, TILE)
    return Seen(
        context, q_start, q_len, a_low, a_high, b_low, b_high, a_first, a_tiles, b_first,
        a_tiles + b_tiles,
    )  # fmt: skip


@gluon.jit
def find_piece(
    query_starts, context_lens, request, begins, position, end, window, sink_tokens,
    PAGE: gl.constexpr, TILE: gl.constexpr, FULL: gl.constexpr, WINDOW: gl.constexpr,
    SEGMENT: gl.constexpr, lead=0,
):  # fmt: skip
    """What lies at ``position`` of a line whose request begins at ``begins``. lead: as of
    row_programs, 0 where rows are cut evenly.
    """
    seen = seen_of(
        query_starts, context_lens, request, window, sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT
    )
    whole = with_lead(seen.tiles, lead)
    item = (position - begins) // gl.maximum(whole, 1)
    row_start = begins + item * whole
    first_tile = gl.maximum(position - row_start - lead, 0)
    last_tile = gl.maximum(gl.minimum(seen.tiles, end - row_start - lead), first_tile)
    return Piece(seen, item, first_tile, last_tile, row_start)


@gluon.jit
def behind(piece, request, begins, rows_a_request, lead=0):
    """Where the line goes on behind a piece's row: the position, its request and where that begins;
    behind the program's end, where that has not the whole of the row.
    """
    whole = with_lead(piece.seen.tiles, lead)
    position = piece.row_start + whole
    if position - begins >= whole * rows_a_request:
        request += 1
        begins = position
    return position, request, begins


@gluon.jit
def capped(score, softcap):
    """Scores, natural, as powers of two under the cap."""
    # tanh(x) = 1 - 2 / (1 + e^2x): exact at both ends.
    bent = gl.exp2(score * (2.0 * LOG2E / softcap))
    return (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + bent))


@gluon.jit
def seen_pairs(
    key, shown, row_first, rows: gl.constexpr, first_seat, q_len, window, sink_tokens,
    PAGE: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, FULL: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """Which of a tile's pairs [keys, rows] the mask shows. shown: keys that some query sees."""
    row = here(row_first) + gl.arange(0, ROWS, rows)
    seat = first_seat + row // GROUP
    seen = shown[:, None] & (row < q_len * GROUP)[None, :]
    if not FULL:
        seen = seen & (key[:, None] <= seat[None, :])
    if WINDOW:
        near = key[:, None] > seat[None, :] - window
        seen = seen & (near | (key < sink_tokens)[:, None])
    if SEGMENT != ALL_KEYS:
        exact = exact_pairs(seat[None, :], key[:, None], PAGE)
        seen = seen & (exact if SEGMENT == EXACT_KEYS else ~exact)
    return seen


@gluon.jit
def seen_rows(
    key, shown, row_first, rows: gl.constexpr, q_len, PAGE: gl.constexpr, ROWS: gl.constexpr,
    GROUP: gl.constexpr, FULL: gl.constexpr, WINDOW: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """The same [rows, keys]. shown: gluon_drafts_operands.Shown."""
    row = here(row_first) + gl.arange(0, ROWS, rows)
    seat = shown.first_seat + row // GROUP
    some = shown_keys(
        key, shown.a_low, shown.a_high, shown.b_low, shown.b_high, shown.first_seat, shown.window,
        shown.sink_tokens, WINDOW, SEGMENT,
    )  # fmt: skip
    seen = some[None, :] & (row < q_len * GROUP)[:, None]
    if not FULL:
        seen = seen & (key[None, :] <= seat[:, None])
    if WINDOW:
        near = key[None, :] > seat[:, None] - shown.window
        seen = seen & (near | (key < shown.sink_tokens)[None, :])
    if SEGMENT != ALL_KEYS:
        exact = exact_pairs(seat[:, None], key[None, :], PAGE)
        seen = seen & (exact if SEGMENT == EXACT_KEYS else ~exact)
    return seen


@gluon.jit
def row_sums(weights, anchor, rows: gl.constexpr):
    """Of each row: the sum of weights, its log2-sum-exp, and what outputs are multiplied by."""
    return _sums(gl.convert_layout(gl.sum(gl.sum(weights, 0), 0), rows), anchor)


@gluon.jit
def lane_sums(weights, anchor, rows: gl.constexpr):
    """The same of weights [rows, lanes of a row]."""
    return _sums(gl.convert_layout(gl.sum(weights, 1), rows), anchor)


@gluon.jit
def _sums(total, anchor):
    some = total != 0
    row_lse = gl.where(some, anchor + gl.log2(gl.where(some, total, 1.0)), float("-inf"))
    ratio = gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)
    return total, row_lse, ratio


@gluon.jit
def store_cut(
    cut, complete, slot_id, program, position, tiles, share, even, row_start=None, lead=0
):
    """Where a row's pieces are, for the merge (triton_cuts): the first one's slot, -1 for none, and
    the program that holds the last.
    """
    gl.store(cut, gl.where(complete, -1, slot_id))
    if row_start is None:
        row_start = position
    _, last, _ = row_programs(program, position, row_start, tiles, share, even, lead)
    gl.store(cut + 1, last)


@gluon.jit
def with_sink(row_lse, ratio, sinks, head, real):
    """log2-sum-exps and ratios with one more key, which has no value."""
    sink = gl.load(sinks + head, mask=real, other=0.0).to(gl.float32) * LOG2E
    peak = gl.maximum(row_lse, sink)
    whole = peak + gl.log2(gl.exp2(row_lse - peak) + gl.exp2(sink - peak))
    return whole, ratio * gl.exp2(row_lse - whole)
