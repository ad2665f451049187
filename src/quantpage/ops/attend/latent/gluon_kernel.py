"""Attention over latent rows on Hopper: keys by queries, each code read once for two products.

    S [keys, rows]     = K [keys, channels] q [channels, rows]      wgmma
    O [channels, rows] = K' [channels, keys] p [keys, rows]         mma or wgmma, as K'

It is decode/gluon_kernel for rows that are keys and values: the same anchors, plan, cut rows and
masks. A tile of 64 rows comes by asynchronous copy into a ring; threads take it from there twice,
in the order of either product, a part of its channels at a time (gluon_operands), so that neither a
tile of codes nor of numbers has to fit into registers beside the output.

How a row's tiles are walked depends on its rows: up to 32 of them memory bounds (gluon_few), of 64
the tensor cores (gluon_many).
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_operands import shared_layout
from quantpage.ops.attend.decode.gluon_rows import (
    behind,
    find_piece,
    row_sums,
    store_cut,
    with_sink,
)
from quantpage.ops.attend.decode.gluon_share import (
    here,
    key_ranges,
    my_share,
    row_programs,
    same,
    tile_ranges,
)
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.attend.latent import launch
from quantpage.ops.attend.latent.gluon_few import walk_few
from quantpage.ops.attend.latent.gluon_join import arrive, finish_empty, join_pieces
from quantpage.ops.attend.latent.gluon_many import walk_many
from quantpage.ops.attend.latent.gluon_operands import (
    PART,
    ask_queries,
    codes_into_l2,
    ordered,
    query_layout,
    scales_into_l2,
    store_queries,
)
from quantpage.ops.attend.latent.gluon_records import (
    Pages,
    Results,
    Rings,
    Seen,
    Table,
    copy_tile,
    first_key,
    fixed_of,
    page_at,
    scales_at,
)
from quantpage.ops.triton.common import FP8, LN2, LOG2E, Constant
from quantpage.ops.triton.gluon_compat import (
    async_copy,
    fence_async_shared,
    thread_barrier,
)

HINTS = Constant(launch.HINTS)


@gluon.constexpr_function
def ring_layout(tile, words, wide):
    """Of a tile's words: as threads read them, or as the product and threads do."""
    if wide:
        return gl.NVMMASharedLayout.get_default_for([tile, words], gl.int32)
    return shared_layout(words, gl.int32)


@gluon.jit(
    do_not_specialize=["requests", "min_tiles", "window", "sink_tokens", "table_row", "pages"],
    do_not_specialize_on_alignment=["row_tiles"],
)
def attend_kernel(
    q,
    row_codes,
    row_scale,
    rotary_codes,
    rotary_scale,
    page_table,
    query_starts,
    context_lens,
    sinks,
    out,
    lse,
    part_out,
    part_lse,
    cuts,
    softmax_scale,
    softcap,
    requests,
    row_tiles,
    min_tiles,
    window,
    sink_tokens,
    q_token,
    q_head,
    row_page,
    row_scale_page,
    rotary_page,
    rotary_scale_page,
    table_row,
    out_token,
    out_head,
    hints,
    pages,
    counters,
    pieces,
    starts,
    CODE: gl.constexpr,
    ROW_DIM: gl.constexpr,
    ROTARY_DIM: gl.constexpr,
    HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    ROWS: gl.constexpr,
    FULL: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
    SINKS: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Arguments as in triton_kernel.decode_kernel; codes as 32-bit words. STAGES: 3 or 4, of up
    to 32 rows 2 as well.

    hints: int32 [programs, HINTS], where a program's first tiles lay in the launch before. pages:
    of the layer. counters: zeros, one a row, by which the last of a row's programs knows that it
    joins the pieces; None: another launch does, and ``cuts`` says what. pieces, starts: a prompt's
    plan (prompts.PromptPlan); None: programs share a decode step's line of tiles.
    """
    FIXED: gl.constexpr = fixed_of(
        CODE, ROW_DIM, HEADS, PAGE, ROWS, FULL, WINDOW, SOFTCAP, SINKS, gl.num_warps()
    )
    paged = Pages(
        row_codes, row_scale, rotary_codes, rotary_scale, row_page, row_scale_page, rotary_page,
        rotary_scale_page,
    )  # fmt: skip
    results = Results(out, lse, part_out, part_lse, sinks, out_token, out_head)
    gl.static_assert(STAGES == 3 or STAGES == 4 or (STAGES == 2 and ROWS < 64))
    WARPS: gl.constexpr = gl.num_warps()
    TILE: gl.constexpr = FIXED.TILE
    WORDS: gl.constexpr = ROW_DIM // 4
    ROTARY_WORDS: gl.constexpr = ROTARY_DIM // 4
    # Integer keys are multiplied as bytes.
    BYTES: gl.constexpr = CODE != FP8
    Q_NUMBER: gl.constexpr = gl.int8 if BYTES else gl.float16
    Q_ROWS: gl.constexpr = 2 * ROWS if BYTES else ROWS
    s_keys: gl.constexpr = gl.SliceLayout(1, FIXED.scores)
    s_rows: gl.constexpr = gl.SliceLayout(0, FIXED.scores)
    WIDE: gl.constexpr = ROWS == 64
    o_rows: gl.constexpr = gl.SliceLayout(0, FIXED.outputs)
    # Words of a part of the second product.
    V_WORDS: gl.constexpr = 8 * WARPS
    V_PARTS: gl.constexpr = WORDS // V_WORDS
    q_rows: gl.constexpr = gl.SliceLayout(1, query_layout(PART, WARPS))
    # Tiles that are asked for before the walk.
    AT_FIRST: gl.constexpr = STAGES - 1 if WIDE else STAGES

    row_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES, TILE, WORDS], ring_layout(TILE, WORDS, WIDE)
    )
    rotary_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES, TILE, ROTARY_WORDS], ring_layout(TILE, ROTARY_WORDS, WIDE)
    )
    rings = Rings(row_ring, rotary_ring)
    q_smem = gl.allocate_shared_memory(
        Q_NUMBER, [1, Q_ROWS, ROW_DIM],
        gl.NVMMASharedLayout.get_default_for([Q_ROWS, ROW_DIM], Q_NUMBER),
    )  # fmt: skip
    turned_smem = gl.allocate_shared_memory(
        Q_NUMBER, [Q_ROWS, ROTARY_DIM],
        gl.NVMMASharedLayout.get_default_for([Q_ROWS, ROTARY_DIM], Q_NUMBER),
    )  # fmt: skip
    # Of two tiles, where one is stored while the one before is still read.
    TURNS: gl.constexpr = 2 if WIDE else 1
    p_smem = gl.allocate_shared_memory(
        gl.float16, [TURNS, TILE, ROWS],
        gl.NVMMASharedLayout.get_default_for([TILE, ROWS], gl.float16),
    )  # fmt: skip
    far_smem = gl.allocate_shared_memory(
        gl.int32, [TURNS, WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )

    # Read again for every tile: in registers it would stand beside all outputs.
    factor_smem = gl.allocate_shared_memory(
        gl.float32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )

    program = gl.program_id(0)
    if OVERLAP and PAGE >= TILE:
        # What this program began with in the launch before, mostly of the same step's layer before:
        # to be wrong costs a look at the wrong page, and to read what changes is no harm.
        for i in gl.static_range(STAGES):
            nth = gl.load(hints + program * HINTS + i)
            nth = gl.maximum(gl.minimum(nth, pages * (PAGE // TILE) - 1), 0)
            page, at = nth // (PAGE // TILE), nth % (PAGE // TILE) * TILE
            scales_into_l2(paged, page, at, PAGE, TILE)
            codes_into_l2(row_codes, row_page, page, at, PAGE, TILE, WORDS)
            codes_into_l2(rotary_codes, rotary_page, page, at, PAGE, TILE, ROTARY_WORDS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if pieces is None:
        start, end, share, request, begins, even = my_share(
            query_starts, context_lens, requests, row_tiles, min_tiles, window, sink_tokens, PAGE,
            TILE, FULL, WINDOW, ALL_KEYS, CHUNK,
        )  # fmt: skip
        start, end, share = same(start), same(end), same(share)
        request, begins = same(request), same(begins)
    else:
        start = same(gl.load(starts + program))
        end = same(gl.load(starts + program + 1))
        request, begins = start, start
    position = start
    while position < end:
        if pieces is None:
            walk = find_piece(
                query_starts, context_lens, request, begins, position, end, window, sink_tokens,
                PAGE, TILE, FULL, WINDOW, ALL_KEYS,
            )  # fmt: skip
            whole = walk.seen
            seen = Seen(
                whole.context, whole.q_start, whole.q_len, whole.a_low, whole.a_high, whole.b_low,
                whole.b_high, whole.a_first, whole.a_tiles, whole.b_first, walk.item * ROWS,
                walk.first_tile, walk.last_tile, window, sink_tokens,
            )  # fmt: skip
        else:
            request, seen, slot = read_piece(pieces, position, window, sink_tokens, FIXED)
        if seen.last_tile > seen.first_tile:
            table = Table(page_table + request.to(gl.int64) * table_row, seen.context - 1)
            q_row = seen.row_first + gl.arange(0, ROWS, q_rows)
            q_at = (seen.q_start + q_row // HEADS).to(gl.int64) * q_token
            q_at += (q_row % HEADS).to(gl.int64) * q_head
            asked0, asked1, asked2, asked3, turned = ask_queries(
                q + q_at, q_row < seen.q_len * HEADS, ROW_DIM, ROTARY_DIM, WARPS
            )
            # Pages are looked up before they are needed: of the ring's tiles, and of the next.
            first_page = page_at(table, seen, seen.first_tile, FIXED)
            next_page = page_at(table, seen, seen.first_tile + 1, FIXED)
            third_page = page_at(table, seen, seen.first_tile + 2, FIXED)
            fourth_page = page_at(table, seen, seen.first_tile + 3, FIXED)
            for i in gl.static_range(STAGES):
                page = (
                    first_page if i == 0
                    else next_page if i == 1 else third_page if i == 2 else fourth_page
                )  # fmt: skip
                start_of = first_key(
                    seen, gl.minimum(seen.first_tile + i, seen.last_tile - 1), FIXED
                )
                if i > 0:
                    scales_into_l2(paged, page, start_of, PAGE, TILE)
                if OVERLAP and PAGE >= TILE:
                    nth = page * (PAGE // TILE) + start_of % PAGE // TILE
                    gl.store(hints + program * HINTS + i, nth, mask=position == start)
            key_start = first_key(seen, seen.first_tile, FIXED)
            copy_tile(rings, 0, paged, first_page, table, key_start, FIXED)
            async_copy.commit_group()
            scale, other = scales_at(paged, first_page, table, key_start, FIXED, s_keys)

            natural: gl.constexpr = 1.0 if SOFTCAP else LOG2E
            factor = store_queries(
                q_smem.index(0), turned_smem, asked0, asked1, asked2, asked3, turned, q_rows, CODE,
                WARPS,
            )  # fmt: skip
            factor = gl.convert_layout(factor, s_rows) * (softmax_scale * natural)
            if WIDE:
                factor_smem.store(factor)
                # The first tile's codes are multiplied where they lie, as queries are.
                async_copy.wait_group(0)
            # It waits for copies under way, of which there is one.
            fence_async_shared()
            for i in gl.static_range(1, AT_FIRST):
                t = seen.first_tile + i
                if t < seen.last_tile:
                    page = next_page if i == 1 else third_page if i == 2 else fourth_page
                    copy_tile(rings, i, paged, page, table, first_key(seen, t, FIXED), FIXED)
                async_copy.commit_group()

            if WIDE:
                acc0, acc1, weights, anchor = walk_many(
                    rings, q_smem, turned_smem, p_smem, far_smem, paged, table, seen, next_page,
                    scale, other, factor_smem, softcap, FIXED,
                )  # fmt: skip
                acc2 = acc0
                acc3 = acc1
            else:
                ahead_page = page_at(table, seen, seen.first_tile + STAGES, FIXED)
                acc0, acc1, acc2, acc3, weights, anchor = walk_few(
                    rings, q_smem.index(0), turned_smem, p_smem.index(0), far_smem.index(0), paged,
                    table, seen, next_page, ahead_page, scale, other, factor, softcap, FIXED,
                )  # fmt: skip
            # Nobody reads the ring any more.
            thread_barrier()
            row = here(seen.row_first) + gl.arange(0, ROWS, s_rows)
            real = row < seen.q_len * HEADS
            token_at = (seen.q_start + row // HEADS).to(gl.int64)
            head = row % HEADS
            _, row_lse, ratio = row_sums(weights, anchor, s_rows)
            if pieces is None:
                complete = (seen.first_tile == 0) & (seen.last_tile == whole.tiles)
                slot_id = 2 * program + (position != start).to(gl.int32)
                if counters is None and seen.first_tile == 0:
                    cut = cuts + (request * row_tiles + walk.item) * 2
                    store_cut(cut, complete, slot_id, program, position, whole.tiles, share, even)
            else:
                complete = slot < 0
                slot_id = 2 * slot
            if complete:
                if SINKS:
                    row_lse, ratio = with_sink(row_lse, ratio, sinks, head, real)
                if lse is not None:
                    gl.store(lse + token_at * HEADS + head, row_lse * LN2, mask=real)
            else:
                piece = slot_id.to(gl.int64) * ROWS + gl.arange(0, ROWS, s_rows)
                gl.store(part_lse + piece, row_lse, mask=real)
            ratio = gl.convert_layout(ratio, o_rows)
            for i in gl.static_range(V_PARTS):
                acc = acc0 if i == 0 else acc1 if i == 1 else acc2 if i == 2 else acc3
                _store(
                    acc * ratio[None, :], complete, results, seen, slot_id, i * 4 * V_WORDS, FIXED
                )
            if counters is not None:  # noqa: SIM102
                if not complete:
                    first, last, first_slot = row_programs(
                        program, position, position - seen.first_tile, whole.tiles, share, even
                    )
                    if arrive(counters + request * row_tiles + walk.item, last - first + 1):
                        join_pieces(
                            results, first_slot, first, last - first + 1, seen.q_start, seen.q_len,
                            seen.row_first, FIXED,
                        )  # fmt: skip
        if pieces is None:
            position, request, begins = behind(walk, request, begins, row_tiles)
        else:
            position += 1
    if counters is not None:
        finish_empty(query_starts, context_lens, requests, results, window, sink_tokens, FIXED)


@gluon.jit
def read_piece(pieces, position, window, sink_tokens, FIXED: gl.constexpr):
    """A row of prompts.FIELDS: its request, which is seen as if its tokens ended with the row's
    last, and the slot of its result.
    """
    at = pieces + position * 8
    request, q_start = same(gl.load(at)), same(gl.load(at + 1))
    context, q_len = same(gl.load(at + 2)), same(gl.load(at + 3))
    row_first, slot = same(gl.load(at + 4)), same(gl.load(at + 7))
    first_tile, last_tile = same(gl.load(at + 5)), same(gl.load(at + 6))
    a_low, a_high, b_low, b_high = key_ranges(
        context, q_len, window, sink_tokens, FIXED.PAGE, FIXED.FULL, FIXED.WINDOW, ALL_KEYS
    )
    a_first, a_tiles, b_first, _ = tile_ranges(a_low, a_high, b_low, b_high, FIXED.TILE)
    seen = Seen(
        context, q_start, q_len, a_low, a_high, b_low, b_high, a_first, a_tiles, b_first, row_first,
        first_tile, last_tile, window, sink_tokens,
    )  # fmt: skip
    return request, seen, slot


@gluon.jit
def _store(acc, complete, results, seen, slot_id, FIRST: gl.constexpr, FIXED: gl.constexpr):
    """A part of the output, channels from FIRST on, to the result or to a piece."""
    HEADS: gl.constexpr = FIXED.HEADS
    o = ordered(acc, gl.num_warps())
    layout: gl.constexpr = o.type.layout
    channel = FIRST + gl.arange(0, o.shape[1], gl.SliceLayout(0, layout))
    nth = gl.arange(0, o.shape[0], gl.SliceLayout(1, layout))
    row = seen.row_first + nth
    keep = (row < seen.q_len * HEADS)[:, None]
    if complete:
        at = (seen.q_start + row // HEADS).to(gl.int64) * results.out_token
        at += (row % HEADS).to(gl.int64) * results.out_head
        made = o.to(results.out.dtype.element_ty)
        gl.store(results.out + at[:, None] + channel[None, :], made, mask=keep)
    else:
        at = (slot_id.to(gl.int64) * acc.shape[1] + nth) * FIXED.ROW_DIM
        gl.store(results.part_out + at[:, None] + channel[None, :], o, mask=keep)
