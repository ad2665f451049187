"""Who decodes what: equal ranges of tiles for a fixed grid, worked out on the device.

A step's work is a line of tiles: request after request, in each its kv_heads, in each the tiles of
keys that its mask shows. Program c of a fixed grid takes the tiles c * share .. (c + 1) * share,
wherever they fall:

    request 0 (2 heads x 3 tiles)   request 1 (2 heads x 1 tile)     share 3
    |h0: 0 1 2|h1: 0 1 2|           |h0: 0|h1: 0|
     program 0  program 1             program 2

Where it makes no share more than CUT_COST tiles longer, rows are cut evenly instead, each into
pieces of its own, and no program has parts of two: beginning a row costs as much as a few tiles.
Else the line has LEAD tiles before each row's own, so that who has many short rows has fewer tiles.

A row (request, head) that falls into one program is finished there; one that is cut leaves partial
results, and the program in which it begins says so in a descriptor that the merge reads. The
lengths are read on the device by every program, so that a CUDA graph replays with new lengths: no
launch depends on them and nothing is read back.
"""

import triton
import triton.language as tl

from quantpage.ops.attend.flash.triton_segments import ALL_KEYS, BODY_KEYS, EXACT_KEYS, near_page
from quantpage.ops.triton.common import Constant

CUT_COST = Constant(2)
"""Tiles in whose time a program ends one row and begins another (docs/decode-measured.md)."""


@triton.jit
def key_ranges(
    context,
    new,
    window,
    sink_tokens,
    PAGE: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Two half-open key ranges, a before b, that hold every key some query of a request sees.

    SEGMENT: 0 all, 1 body, 2 exact (attend/params). Works on scalars and on vectors of requests.
    """
    first = context - new
    low = context * 0
    if WINDOW:
        low = tl.maximum(first - window + 1, 0)
    a_low = context * 0
    a_high = tl.minimum(a_low + sink_tokens, low)
    b_low = low
    b_high = context
    if SEGMENT == BODY_KEYS:
        a_low = a_low + PAGE
        b_low = tl.maximum(low, PAGE)
        if not FULL:
            b_high = near_page(context - 1, PAGE) * PAGE
        a_high = tl.minimum(a_high, b_high)
    if SEGMENT == EXACT_KEYS:
        if WINDOW:
            a_low = tl.where(sink_tokens > 0, 0, low)
        a_high = tl.minimum(context, PAGE)
        b_low = tl.maximum(near_page(first, PAGE) * PAGE, PAGE)
        if WINDOW:
            b_low = tl.where(sink_tokens > 0, b_low, tl.maximum(b_low, low))
    a_high = tl.maximum(a_low, a_high)
    b_high = tl.where(new > 0, tl.maximum(b_low, b_high), b_low)
    a_high = tl.where(new > 0, a_high, a_low)
    return a_low, a_high, b_low, b_high


@triton.jit
def shown_keys(
    key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens, WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """Keys that some query of the request sees."""
    shown = key < b_high
    if WINDOW or SEGMENT != ALL_KEYS:
        shown = ((key >= a_low) & (key < a_high)) | ((key >= b_low) & shown)
    if WINDOW and SEGMENT == EXACT_KEYS:
        shown &= (key >= first_seat - window + 1) | (key < sink_tokens)
    return shown


@triton.jit
def keys_of_all(
    context, first_seat, window, PAGE: tl.constexpr, FULL: tl.constexpr, WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """Half-open range of keys that every query of the request sees."""
    low = 0
    high = first_seat + 1
    if FULL:
        high = context
    if WINDOW:
        low = tl.maximum(context - window, 0)
    if SEGMENT == BODY_KEYS:
        low = tl.maximum(low, PAGE)
        high = tl.minimum(high, near_page(first_seat, PAGE) * PAGE)
    if SEGMENT == EXACT_KEYS:
        high = 0
    return low, high


@triton.jit
def tile_ranges(a_low, a_high, b_low, b_high, TILE: tl.constexpr):
    """First tile and number of tiles of each key range; a tile belongs to one of them."""
    a_first = a_low // TILE
    a_tiles = tl.where(a_high > a_low, (a_high + TILE - 1) // TILE - a_first, 0)
    b_first = tl.where(a_tiles > 0, tl.maximum(b_low // TILE, a_first + a_tiles), b_low // TILE)
    b_last = tl.where(b_high > b_low, (b_high + TILE - 1) // TILE, b_first)
    return a_first, a_tiles, b_first, tl.maximum(b_last - b_first, 0)


@triton.jit
def tiles_of(
    context, new, window, sink_tokens, PAGE: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr,
    WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Tiles of a request of so many tokens, of each of its kv_heads."""
    a_low, a_high, b_low, b_high = key_ranges(
        context, new, window, sink_tokens, PAGE, FULL, WINDOW, SEGMENT
    )
    _, a_tiles, _, b_tiles = tile_ranges(a_low, a_high, b_low, b_high, TILE)
    return a_tiles + b_tiles


@triton.jit
def _chunk_tiles(
    query_starts,
    context_lens,
    requests,
    first,
    window,
    sink_tokens,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = first + tl.arange(0, CHUNK)
    real = row < requests
    context = tl.load(context_lens + row, real, 0)
    new = tl.load(query_starts + row + 1, real, 0) - tl.load(query_starts + row, real, 0)
    new = tl.minimum(new, context)
    tiles = tiles_of(context, new, window, sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT)
    return tl.where(real, tiles, 0)


@triton.jit
def request_tiles(
    query_starts, context_lens, request, window, sink_tokens, PAGE: tl.constexpr,
    TILE: tl.constexpr, FULL: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Tiles of one request, of each of its kv_heads."""
    context = tl.load(context_lens + request)
    new = tl.load(query_starts + request + 1) - tl.load(query_starts + request)
    new = tl.minimum(new, context)
    return tiles_of(context, new, window, sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT)


@triton.jit
def with_lead(tiles, lead):
    """What a row of so many tiles takes of the line."""
    return tl.where(tiles > 0, tiles + lead, 0)


@triton.jit
def my_share(
    query_starts,
    context_lens,
    requests,
    rows_a_request,
    min_tiles,
    window,
    sink_tokens,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    LEAD: tl.constexpr = 0,
):
    """This program's part start .. end of the line, the largest share of its row's programs, the
    request that start falls in with the place of its first tile, and whether rows are cut evenly.
    LEAD: tiles that the line has before each row's own where rows are not cut evenly.
    """
    # Requests of a chunk are one vector; almost always there is one chunk.
    tiles = _chunk_tiles(
        query_starts, context_lens, requests, 0, window, sink_tokens,
        PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK,
    )  # fmt: skip
    total = tl.sum(tiles, 0)
    line = tl.sum(with_lead(tiles, LEAD), 0)
    for first in range(CHUNK, requests, CHUNK):
        more = _chunk_tiles(
            query_starts, context_lens, requests, first, window, sink_tokens,
            PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK,
        )  # fmt: skip
        total += tl.sum(more, 0)
        line += tl.sum(with_lead(more, LEAD), 0)
    total = total * rows_a_request
    line = line * rows_a_request
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    share = tl.maximum(tl.cdiv(total, programs), min_tiles)
    # Rows cut evenly need no more programs than there are, and none with much more to do.
    pieces, each = even_pieces(tiles, total, programs, min_tiles)
    used = tl.sum(pieces + tl.where(each > share + CUT_COST, 1 << 20, 0), 0)
    even = (requests <= CHUNK) & (used <= programs // rows_a_request)
    if even:
        upto = tl.cumsum(pieces, 0) * rows_a_request
        # Of the requests that end before this program's: how many, and the programs they take.
        nth = tl.arange(1, CHUNK + 1)
        ended = tl.max(tl.where(upto <= program, (nth << 16) + upto, 0), 0)
        request = tl.minimum(ended >> 16, requests - 1)
        local = program - (ended & 0xFFFF)
        row_tiles = request_tiles(
            query_starts, context_lens, request, window, sink_tokens, PAGE, TILE, FULL, WINDOW,
            SEGMENT,
        )  # fmt: skip
        row_pieces, row_share = even_pieces(row_tiles, total, programs, min_tiles)
        share = tl.maximum(row_share, 1)
        item = local // tl.maximum(row_pieces, 1)
        begins = 0
        start = item * row_tiles + (local - item * row_pieces) * share
        end = tl.minimum((item + 1) * row_tiles, start + share)
        end = tl.where(program < used * rows_a_request, end, start)
    else:
        share = tl.maximum(tl.cdiv(line, programs), min_tiles + LEAD)
        start = program * share
        end = tl.minimum(start + share, line)
        passed = tl.cumsum(with_lead(tiles, LEAD), 0) * rows_a_request
        before = passed <= start
        request = tl.sum(before.to(tl.int32), 0)
        begins = tl.max(tl.where(before, passed, 0), 0)
        seen = tl.max(passed, 0)
        for first in range(CHUNK, requests, CHUNK):
            more = _chunk_tiles(
                query_starts, context_lens, requests, first, window, sink_tokens,
                PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK,
            )  # fmt: skip
            passed = seen + tl.cumsum(with_lead(more, LEAD), 0) * rows_a_request
            before = passed <= start
            request += tl.sum(before.to(tl.int32), 0)
            begins = tl.maximum(begins, tl.max(tl.where(before, passed, 0), 0))
            seen = tl.max(passed, 0)
    return start, end, share, request, begins, even


@triton.jit
def even_pieces(tiles, total, programs, min_tiles):
    """Pieces that each row of a request would be cut into evenly, and the tiles of each: as many
    as its part of all tiles, rounded down, so that they take no more than all programs.

    Quotients of floats, a third of the instructions of integers': (a + 1/2) / b rounds down right
    for tiles below 2^20.
    """
    size = tiles.to(tl.float32)
    ratio = programs.to(tl.float32) / tl.maximum(total, 1).to(tl.float32)
    most = (size + 0.5) / min_tiles.to(tl.float32)
    pieces = tl.maximum(tl.minimum(size * ratio + 1e-3, most).to(tl.int32), 1)
    each = ((size + pieces.to(tl.float32) - 0.5) / pieces.to(tl.float32)).to(tl.int32)
    filled = tl.maximum(each, 1).to(tl.float32)
    return ((size + filled - 0.5) / filled).to(tl.int32), each


@triton.jit
def cut_of_one(tiles, rows, programs, min_tiles):
    """How the rows of a step of one request, of ``tiles`` each, are cut: the pieces of a row and
    the tiles of each, the share of a program where rows are cut wherever it ends, and whether they
    are cut evenly. Then row r has the programs from r pieces on.
    """
    total = tiles * rows
    share = tl.maximum((total + programs - 1) // programs, min_tiles)
    pieces, each = even_pieces(tiles, total, programs, min_tiles)
    even = (each <= share + CUT_COST) & (pieces * rows <= programs)
    return pieces, tl.maximum(each, 1), share, even


@triton.jit
def row_programs(program, position, row_start, tiles, share, even, lead=0):
    """The programs that have tiles of a row, first and last, and the slot of its first piece.

    position: where the asking program enters the row. lead: what the line has before its tiles
    where rows are not cut evenly.
    """
    first = tl.where(even, program - (position - row_start) // share, (row_start + lead) // share)
    pieces = (tiles + share - 1) // share
    last = tl.where(even, first + pieces - 1, (row_start + lead + tiles - 1) // share)
    inside = (row_start > first * share).to(tl.int32)
    return first, last, 2 * first + tl.where(even, 0, inside)
