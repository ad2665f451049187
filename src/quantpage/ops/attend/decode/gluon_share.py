"""triton_share for the Hopper decode kernel: the same shares, with layouts; and its pages.

What triton_share says of scalars or of one element serves both kernels as it is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode import triton_share
from quantpage.ops.attend.decode.triton_share import CUT_COST
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.triton.common import A_TOKEN
from quantpage.ops.triton.gluon_compat import async_copy

key_ranges = gluon.jit(triton_share.key_ranges.fn)
shown_keys = gluon.jit(triton_share.shown_keys.fn)
keys_of_all = gluon.jit(triton_share.keys_of_all.fn)
tile_ranges = gluon.jit(triton_share.tile_ranges.fn)
tiles_of = gluon.jit(triton_share.tiles_of.fn)
even_pieces = gluon.jit(triton_share.even_pieces.fn)
cut_of_one = gluon.jit(triton_share.cut_of_one.fn)
with_lead = gluon.jit(triton_share.with_lead.fn)
row_programs = gluon.jit(triton_share.row_programs.fn)


@gluon.jit
def same(x):
    """x, which the assembler then knows to be one number for all threads of a warp: its arithmetic
    moves to the uniform registers, and threads keep theirs (some 60 here) for tiles.
    """
    return gl.inline_asm_elementwise(
        "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def here(x):
    """x, unknown to the compiler: what is worked out from it takes no registers elsewhere."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _chunk_tiles(
    query_starts, context_lens, requests, first, window, sink_tokens, PAGE: gl.constexpr,
    TILE: gl.constexpr, FULL: gl.constexpr, WINDOW: gl.constexpr, SEGMENT: gl.constexpr,
    CHUNK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    row = first + gl.arange(0, CHUNK, layout)
    real = row < requests
    context = gl.load(context_lens + row, mask=real, other=0)
    new = gl.load(query_starts + row + 1, mask=real, other=0)
    new = gl.minimum(new - gl.load(query_starts + row, mask=real, other=0), context)
    tiles = tiles_of(context, new, window, sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT)
    return gl.where(real, tiles, 0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _share_of_one(
    query_starts, context_lens, rows_a_request, min_tiles, window, sink_tokens, PAGE: gl.constexpr,
    TILE: gl.constexpr, FULL: gl.constexpr, WINDOW: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """The same of a step of one request, which is so short that it waits for its plan: nothing is
    summed over requests, or looked up twice.
    """
    context = gl.load(context_lens)
    new = gl.minimum(gl.load(query_starts + 1) - gl.load(query_starts), context)
    tiles = tiles_of(context, new, window, sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT)
    program = gl.program_id(0)
    pieces, each, share, even = cut_of_one(tiles, rows_a_request, gl.num_programs(0), min_tiles)
    item = program // pieces
    start = gl.where(even, item * tiles + (program - item * pieces) * each, program * share)
    end = gl.where(even, gl.minimum((item + 1) * tiles, start + each), start + share)
    end = gl.where(even & (item >= rows_a_request), start, gl.minimum(end, tiles * rows_a_request))
    return start, end, gl.where(even, each, share), 0, 0, even


@gluon.jit
def my_share(
    query_starts, context_lens, requests, rows_a_request, min_tiles, window, sink_tokens,
    PAGE: gl.constexpr, TILE: gl.constexpr, FULL: gl.constexpr, WINDOW: gl.constexpr,
    SEGMENT: gl.constexpr, CHUNK: gl.constexpr, LEAD: gl.constexpr = 0,
):  # fmt: skip
    """triton_share.my_share, with a layout; CHUNK 1: of one request, and of numbers alone."""
    if CHUNK == 1:
        return _share_of_one(
            query_starts, context_lens, rows_a_request, min_tiles, window, sink_tokens, PAGE, TILE,
            FULL, WINDOW, SEGMENT,
        )  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    tiles = _chunk_tiles(
        query_starts, context_lens, requests, 0, window, sink_tokens, PAGE, TILE, FULL, WINDOW,
        SEGMENT, CHUNK, layout,
    )  # fmt: skip
    total = gl.sum(tiles, 0)
    line = gl.sum(with_lead(tiles, LEAD), 0)
    for first in range(CHUNK, requests, CHUNK):
        more = _chunk_tiles(
            query_starts, context_lens, requests, first, window, sink_tokens, PAGE, TILE, FULL,
            WINDOW, SEGMENT, CHUNK, layout,
        )  # fmt: skip
        total += gl.sum(more, 0)
        line += gl.sum(with_lead(more, LEAD), 0)
    total = total * rows_a_request
    line = line * rows_a_request
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    share = gl.maximum((total + programs - 1) // programs, min_tiles)
    pieces, each = even_pieces(tiles, total, programs, min_tiles)
    used = gl.sum(pieces + gl.where(each > share + CUT_COST, 1 << 20, 0), 0)
    even = (requests <= CHUNK) & (used <= programs // rows_a_request)
    if even:
        upto = gl.associative_scan(pieces, 0, _add) * rows_a_request
        nth = gl.arange(0, CHUNK, layout) + 1
        ended = gl.max(gl.where(upto <= program, (nth << 16) + upto, 0), 0)
        request = gl.minimum(ended >> 16, requests - 1)
        local = program - (ended & 0xFFFF)
        context = gl.load(context_lens + request)
        new = gl.load(query_starts + request + 1) - gl.load(query_starts + request)
        row_tiles = tiles_of(
            context, gl.minimum(new, context), window, sink_tokens, PAGE, TILE, FULL, WINDOW,
            SEGMENT,
        )  # fmt: skip
        row_pieces, row_share = even_pieces(row_tiles, total, programs, min_tiles)
        share = gl.maximum(row_share, 1)
        item = local // gl.maximum(row_pieces, 1)
        begins = 0
        start = item * row_tiles + (local - item * row_pieces) * share
        end = gl.minimum((item + 1) * row_tiles, start + share)
        end = gl.where(program < used * rows_a_request, end, start)
    else:
        share = gl.maximum((line + programs - 1) // programs, min_tiles + LEAD)
        start = program * share
        end = gl.minimum(start + share, line)
        request = 0
        begins = 0
        seen = 0
        for first in range(0, requests, CHUNK):
            more = _chunk_tiles(
                query_starts, context_lens, requests, first, window, sink_tokens, PAGE, TILE,
                FULL, WINDOW, SEGMENT, CHUNK, layout,
            )  # fmt: skip
            passed = seen + gl.associative_scan(with_lead(more, LEAD), 0, _add) * rows_a_request
            before = passed <= start
            request += gl.sum(before.to(gl.int32), 0)
            begins = gl.maximum(begins, gl.max(gl.where(before, passed, 0), 0))
            seen = gl.max(passed, 0)
    return start, end, share, request, begins, even


@gluon.jit
def tile_at(t, a_first, a_tiles, b_first, WINDOW: gl.constexpr, SEGMENT: gl.constexpr):
    """Tile number t of a row, in the line of all keys."""
    tile = b_first + t
    if WINDOW or SEGMENT != ALL_KEYS:
        tile = gl.where(t < a_tiles, a_first + t, b_first + t - a_tiles)
    return tile


@gluon.jit
def page_of(
    table, t, last_tile, a_first, a_tiles, b_first, PAGE: gl.constexpr, TILE: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """The page of tile t or of the last: asked for a turn before it is needed. Where a tile has
    several, they are looked up when they are needed.
    """
    page = 0
    if PAGE >= TILE:
        tile = tile_at(gl.minimum(t, last_tile - 1), a_first, a_tiles, b_first, WINDOW, SEGMENT)
        page = gl.load(table + tile * TILE // PAGE)
    return page


@gluon.jit
def _settled(x):
    """``same``, where it stands: the assembler would ask for a page where it is used alone."""
    return gl.inline_asm_elementwise(
        "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def first_pages(
    table, first_tile, last_tile, a_first, a_tiles, b_first, PAGE: gl.constexpr,
    TILE: gl.constexpr, WINDOW: gl.constexpr, SEGMENT: gl.constexpr, COUNT: gl.constexpr,
):  # fmt: skip
    """The pages of a row's first tiles, a tuple."""
    asked = ()
    for i in gl.static_range(COUNT):
        page = page_of(
            table, first_tile + i, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW, SEGMENT
        )
        asked += (page,)  # type: ignore[assignment]
    pages = ()
    for i in gl.static_range(COUNT):
        page = _settled(asked[i]) if PAGE >= TILE else asked[i]
        pages += (page,)  # type: ignore[assignment]
    return pages


@gluon.jit
def copy_codes(
    smem, codes, page_stride, page, table, key_start, last_key, PAGE: gl.constexpr,
    TILE: gl.constexpr, UNITS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Ask for a tile's codes of one half; pages past the last key's are not followed."""
    lane = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, layout))
    if PAGE >= TILE:
        base = codes + page.to(gl.int64) * page_stride + key_start % PAGE * UNITS
        at = lane[:, None] * UNITS + unit[None, :]
        async_copy.async_copy_global_to_shared(smem, base + at, eviction_policy="evict_first")
    else:
        key = gl.minimum(key_start + lane, last_key)
        pages = gl.load(table + key // PAGE).to(gl.int64)
        rows = codes + pages * page_stride + key % PAGE * UNITS
        async_copy.async_copy_global_to_shared(smem, rows[:, None] + unit[None, :])


@gluon.jit
def token_plane(
    plane, page_stride, page, table, key_start, last_key, PAGE: gl.constexpr, TILE: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Scales or zeros of a tile's keys as they lie; past the last key, those of the last."""
    key = gl.minimum(key_start + gl.arange(0, TILE, layout), last_key)
    pages = page if PAGE >= TILE else gl.load(table + key // PAGE)
    return gl.load(plane + pages.to(gl.int64) * page_stride + key % PAGE)


@gluon.jit
def planes(
    k_scale, k_zero, v_scale, v_zero, k_page, v_page, page, table, key_start, last_key, none,
    K_SCALES: gl.constexpr, V_SCALES: gl.constexpr, K_ZERO: gl.constexpr, V_ZERO: gl.constexpr,
    PAGE: gl.constexpr, TILE: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """A tile's scales and zeros, ``none`` for those that the cache does not have."""
    ks, kz, vs, vz = none, none, none, none
    if K_SCALES == A_TOKEN:
        ks = token_plane(k_scale, k_page, page, table, key_start, last_key, PAGE, TILE, layout)
        if K_ZERO:
            kz = token_plane(k_zero, k_page, page, table, key_start, last_key, PAGE, TILE, layout)
    if V_SCALES == A_TOKEN:
        vs = token_plane(v_scale, v_page, page, table, key_start, last_key, PAGE, TILE, layout)
        if V_ZERO:
            vz = token_plane(v_zero, v_page, page, table, key_start, last_key, PAGE, TILE, layout)
    return ks, kz, vs, vz
