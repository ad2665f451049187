"""Decode of many query rows on Hopper: rows by keys, one warpgroup and a warp that copies for it.

    S [rows, keys]     = q [rows, channels] K [channels, keys]      wgmma, both from shared memory
    O [rows, channels] = p [rows, keys] V [keys, channels]          wgmma, p from registers

A tile of the tensor cores has 64 rows, where gluon_kernel, which multiplies keys by rows, holds
scores of more than 32 in more registers than a thread has. Rows lie side by side with what belongs
to them: a probability is an operand where it was made, and no warp waits for another's. Of 32
query rows every thread has one where it would have two: the softmax is half, and so are the
products of keys, as the two numbers of a query lie in the two rows (store_queries).

Codes come by TMA, which a proxy fence does not wait for; threads take them from the ring once, and
put what is multiplied beside it (gluon_drafts_operands): values as what they stand for, divided by
a power of two that a tile's share, so that nothing of a key's belongs to p.

    threads        p of t   | numbers of t+1 and t+2 | scores of t+1, their peaks | p of t+1 ..
    tensor cores   S of t+1 | O += of t              | O += of t                  | S of t+2 ..

A tile needs one barrier: before its p is multiplied everybody's numbers have to be there, which are
stored where nobody reads any more. Values and 4-bit keys lie twice for that, what belongs to keys
three times. (Triton sets three more, as it takes places of one buffer for the same.) All of a tile
is read before anything of it is stored: that order the compiler keeps. Anchors, the plan, cut rows,
masks and their names are those of gluon_kernel; scores are taken from their anchor where they are
scaled, in the same operation.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_drafts_operands import (
    Shown,
    all_rows,
    beside_values,
    copy_tile,
    half_of,
    in_order,
    in_ring,
    key_numbers,
    key_numbers_memory,
    of_keys_seen,
    of_tile,
    ring_layout,
    scores,
    some_rows,
    store_numbers,
    store_queries,
    store_values,
    take,
    take_planes,
    turns_of,
    wait_for_scores,
)
from quantpage.ops.attend.decode.gluon_drafts_scores import Weighing, by_lane, weigh
from quantpage.ops.attend.decode.gluon_ends import end_outputs, end_sums
from quantpage.ops.attend.decode.gluon_kernel import FLOOR, SHIFT, SLACK
from quantpage.ops.attend.decode.gluon_records import (
    OfChannels,
    Part,
    Queries,
    Results,
    Rows,
    Share,
    Step,
    fixed_of,
)
from quantpage.ops.attend.decode.gluon_rows import behind, find_piece, lane_sums
from quantpage.ops.attend.decode.gluon_share import (
    keys_of_all,
    my_share,
    page_of,
    same,
    tile_at,
)
from quantpage.ops.attend.flash.gluon_parts import stage_of
from quantpage.ops.triton.common import A_TOKEN, FP8, INT4, INT8, LOG2E, STATIC, Constant
from quantpage.ops.triton.gluon_compat import (
    fence_async_shared,
    mbarrier,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

COPY_REGISTERS = Constant(24)
"""Of the warps beside the warpgroup that multiplies, a thread."""


@gluon.jit
def as_power(unit):
    """log2 of what p is divided by where values are multiplied by ``unit`` (unit_of)."""
    return (unit - 127).to(gl.float32)


@gluon.jit
def _copy(keys, values, turns, page_table, table_row, line, step, FIXED: gl.constexpr):
    """The warp that copies: it asks for every tile of the program's share as soon as the ring has
    room, those of the next row while this one's end.
    """
    PAGE: gl.constexpr = FIXED.PAGE
    ROW_TILES: gl.constexpr = FIXED.ROW_TILES
    TILE: gl.constexpr = FIXED.TILE
    WINDOW: gl.constexpr = FIXED.WINDOW
    SEGMENT: gl.constexpr = FIXED.SEGMENT
    request, begins, position = line.request, line.begins, line.start
    count = 0
    while position < line.end:
        piece = find_piece(
            step.query_starts, step.context_lens, request, begins, position, line.end, step.window,
            step.sink_tokens, PAGE, TILE, FIXED.FULL, WINDOW, SEGMENT,
        )  # fmt: skip
        seen = piece.seen
        head = piece.item // ROW_TILES
        table = page_table + request.to(gl.int64) * table_row
        page = 0
        if piece.last_tile > piece.first_tile:
            page = page_of(
                table, piece.first_tile, piece.last_tile, seen.a_first, seen.a_tiles,
                seen.b_first, PAGE, TILE, WINDOW, SEGMENT,
            )  # fmt: skip
        for t in range(piece.first_tile, piece.last_tile):
            tile = tile_at(t, seen.a_first, seen.a_tiles, seen.b_first, WINDOW, SEGMENT)
            ahead = page_of(
                table, t + 1, piece.last_tile, seen.a_first, seen.a_tiles, seen.b_first, PAGE,
                TILE, WINDOW, SEGMENT,
            )  # fmt: skip
            copy_tile(keys, values, turns, count, page, head, tile * TILE % PAGE, FIXED)
            page = ahead
            count += 1
        position, request, begins = behind(piece, request, begins, step.kv_heads * ROW_TILES)


@gluon.jit
def _multiply(
    keys, values, turns, memory, line, step, queries, channels, results, FIXED: gl.constexpr
):
    """The warpgroup that multiplies."""
    K_CODE: gl.constexpr = FIXED.K_CODE
    HEAD_DIM: gl.constexpr = FIXED.HEAD_DIM
    VALUE_DIM: gl.constexpr = FIXED.VALUE_DIM
    GROUP: gl.constexpr = FIXED.GROUP
    PAGE: gl.constexpr = FIXED.PAGE
    ROWS: gl.constexpr = FIXED.ROWS
    ROW_TILES: gl.constexpr = FIXED.ROW_TILES
    TILE: gl.constexpr = FIXED.TILE
    WINDOW: gl.constexpr = FIXED.WINDOW
    SEGMENT: gl.constexpr = FIXED.SEGMENT
    STAGES: gl.constexpr = FIXED.STAGES
    q_smem, k_smem, v_smem, of_keys, far_smem = memory
    AS_COPIED: gl.constexpr = K_CODE == INT8
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    p_operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    no_score = gl.full([64, TILE], 0, gl.int32, product)
    s_layout: gl.constexpr = some_rows(no_score, ROWS).type.layout
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )
    far_layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    k_ring = in_ring(keys.codes)
    v_ring = in_ring(values.codes)
    program = gl.program_id(0)
    request, begins, position = line.request, line.begins, line.start
    # Tiles of this program before: where the next one lies in the ring.
    count = 0
    while position < line.end:
        piece = find_piece(
            step.query_starts, step.context_lens, request, begins, position, line.end, step.window,
            step.sink_tokens, PAGE, TILE, FIXED.FULL, WINDOW, SEGMENT,
        )  # fmt: skip
        (
            context, q_start, q_len, a_low, a_high, b_low, b_high, a_first, a_tiles, b_first, tiles,
        ) = piece.seen  # fmt: skip
        item, first_tile, last_tile = piece.item, piece.first_tile, piece.last_tile
        if last_tile > first_tile:
            head = (item // ROW_TILES).to(gl.int64)
            row_first = (item % ROW_TILES) * ROWS
            nth = gl.arange(0, 64, gl.SliceLayout(1, q_layout))
            if ROWS == 32:
                nth = nth // 16 * 8 + nth % 8
            q_row = row_first + nth
            channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, q_layout))
            q_at = (q_start + q_row // GROUP).to(gl.int64) * queries.token
            q_at += (head * GROUP + q_row % GROUP) * queries.head
            q_real = (q_row < q_len * GROUP)[:, None]
            asked = gl.load(queries.q + q_at[:, None] + channel[None, :], mask=q_real, other=0.0)
            asked = asked.to(gl.float32)
            natural: gl.constexpr = 1.0 if FIXED.SOFTCAP else LOG2E
            wide: gl.constexpr = gl.SliceLayout(1, product)
            more = gl.full([64], 0.0, gl.float32, wide)
            if FIXED.K_SCALES == STATIC:
                static_at = head * channels.k_head + channel // FIXED.K_SHARED
                if FIXED.K_ZERO:
                    terms = asked * gl.load(channels.k_zero + static_at).to(gl.float32)[None, :]
                    more = gl.convert_layout(gl.sum(terms, 1), wide)
                asked = asked * gl.load(channels.k_scale + static_at).to(gl.float32)[None, :]
            factor, q_sum = store_queries(q_smem, asked, ROWS, K_CODE, wide)
            if K_CODE == INT4:
                more -= 8.0 * q_sum
            factor = gl.convert_layout(some_rows(factor, ROWS), s_rows)
            q_sum = gl.convert_layout(some_rows(q_sum, ROWS), s_rows)
            more = gl.convert_layout(some_rows(more, ROWS), s_rows)
            natural_scale = queries.scale * natural

            first_seat = context - q_len
            all_low, all_high = keys_of_all(
                context, first_seat, step.window, PAGE, FIXED.FULL, WINDOW, SEGMENT
            )
            shown = Shown(a_low, a_high, b_low, b_high, first_seat, step.window, step.sink_tokens)
            given = Weighing(
                factor * natural_scale, more * natural_scale, q_sum * natural_scale, all_low,
                all_high, shown, row_first, q_len, queries.softcap,
            )  # fmt: skip
            # Nothing is known of a row's scores before its first key: any is above this limit.
            anchor = gl.full([ROWS], 0.0, gl.float32, s_rows)
            limit = gl.full([ROWS], FLOOR, gl.float32, s_rows)
            weights = by_lane(gl.full([ROWS, TILE], 0.0, gl.float32, s_layout))
            acc = gl.full([64, VALUE_DIM], 0.0, gl.float32, o_layout)

            # The first tile's numbers and scores, and what the second's need.
            stage, phase = stage_of(count, STAGES)
            after, after_phase = stage_of(count + 1, STAGES)
            last, last_phase = stage_of(count + 2, STAGES)
            key_start = tile_at(first_tile, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
            following = gl.minimum(first_tile + 1, last_tile - 1)
            next_start = tile_at(following, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
            mbarrier.wait(turns.landed.index(stage), phase)
            mbarrier.wait(turns.landed.index(after), after_phase, pred=first_tile + 1 < last_tile)
            v_codes = take(v_ring.index(stage))
            beside = take_planes(keys, values, stage, FIXED)
            next_beside = take_planes(keys, values, after, FIXED)
            if not AS_COPIED:
                k_codes = take(k_ring.index(stage))
                k_smem.index(0).store(key_numbers(k_codes))
                k_codes = take(k_ring.index(after))
                k_smem.index(1).store(key_numbers(k_codes))
            numbers, unit = of_keys_seen(beside, key_start, shown, FIXED)
            store_numbers(of_keys, 0, numbers, FIXED)
            numbers, next_unit = of_keys_seen(next_beside, next_start, shown, FIXED)
            store_numbers(of_keys, 1, numbers, FIXED)
            thread_barrier()
            scale, zero = beside_values(of_tile(of_keys, 0), v_codes.shape[1], FIXED)
            store_values(v_smem.index(0), v_codes, scale, zero, key_start, shown, FIXED)
            fence_async_shared()
            thread_barrier()
            high, low = scores(q_smem, k_smem.index(stage if AS_COPIED else 0), no_score, ROWS)
            high, low = wait_for_scores(high, low, 0, ROWS)
            heavy = weigh(
                high, low, given, of_tile(of_keys, 0), anchor + as_power(unit), limit,
                far_smem.index(0), key_start, s_layout, FIXED,
            )  # fmt: skip

            # Places of this tile's values, of its keys' numbers and of the next two tiles'.
            turn = 0
            now, then, later = 0, 1, 2
            for t in range(first_tile, last_tile):
                fence_async_shared()
                # This tile's values and the next one's keys are there, and everybody has read what
                # lies where those of the tiles behind will.
                thread_barrier()
                mbarrier.arrive(turns.taken.index(stage), count=1)
                # Of the tile past the last what lies there is multiplied, and nobody reads it.
                high, low = scores(
                    q_smem, k_smem.index(after if AS_COPIED else 1 - turn), no_score, ROWS
                )
                # Positive floats are ordered as integers, and negative ones are below them.
                if gl.max(far_smem.index(turn).load(far_layout), 0) > 0:
                    # heavy is of the anchor before.
                    peak = gl.max(heavy, 1)
                    over = peak > limit
                    rise = gl.where(over, peak - SHIFT, 0.0)
                    anchor += rise
                    limit = gl.where(over, SHIFT + SLACK, limit)
                    heavy = heavy - rise[:, None]
                    # Of a row that saw no key before there is nothing to shrink.
                    shrink = gl.exp2(gl.minimum(-rise, 0.0))
                    lanes: gl.constexpr = gl.SliceLayout(1, weights.type.layout)
                    weights = weights * gl.convert_layout(shrink, lanes)[:, None]
                    acc = acc * gl.convert_layout(all_rows(shrink, shrink), o_rows)[:, None]
                # p times what its values are divided by; the row's weight is of p.
                p = gl.exp2(heavy)
                if FIXED.V_SCALES == A_TOKEN:
                    weights += by_lane(p) * (unit << 23).to(gl.float32, bitcast=True)
                else:
                    weights += by_lane(p)
                p16 = p.to(gl.float16)
                p16 = gl.convert_layout(
                    all_rows(p16, gl.full(p16.shape, 0.0, gl.float16, p16.type.layout)), p_operand
                )
                acc = warpgroup_mma(p16, v_smem.index(turn), acc, is_async=True)

                mbarrier.wait(turns.landed.index(last), last_phase, pred=t + 2 < last_tile)
                key_start = next_start
                following = gl.minimum(t + 2, last_tile - 1)
                next_start = tile_at(following, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
                unit = next_unit
                v_codes = take(v_ring.index(after))
                scale, zero = beside_values(of_tile(of_keys, then), v_codes.shape[1], FIXED)
                beside = take_planes(keys, values, last, FIXED)
                if not AS_COPIED:
                    k_codes = take(k_ring.index(last))
                numbers, next_unit = of_keys_seen(beside, next_start, shown, FIXED)
                store_values(v_smem.index(1 - turn), v_codes, scale, zero, key_start, shown, FIXED)
                if not AS_COPIED:
                    k_smem.index(turn).store(key_numbers(k_codes))
                store_numbers(of_keys, later, numbers, FIXED)
                high, low = wait_for_scores(high, low, 1, ROWS)
                turn = 1 - turn
                heavy = weigh(
                    high, low, given, of_tile(of_keys, then), anchor + as_power(unit), limit,
                    far_smem.index(turn), key_start, s_layout, FIXED,
                )  # fmt: skip
                acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
                now, then, later = then, later, now
                stage, after = after, last
                last += 1
                round_trip = last == STAGES
                last = gl.where(round_trip, 0, last)
                last_phase = gl.where(round_trip, last_phase ^ 1, last_phase)
            count += last_tile - first_tile
            # What nobody reads is stored, too: the next row's comes to the same places.
            thread_barrier()
            of = Rows(row_first, q_start, q_len, head, request, item)
            part = Part(first_tile, last_tile, tiles, position, position, 0)
            ended = end_sums(
                weights, anchor, s_rows, lane_sums, of, part, line, step.kv_heads, program, results,
                FIXED,
            )  # fmt: skip
            ratio = ended.ratio
            o = some_rows(acc, ROWS)
            o = o * gl.convert_layout(ratio, gl.SliceLayout(1, o.type.layout))[:, None]
            mass = ended.total * ratio
            end_outputs(in_order(o, FIXED.V_CODE), mass, ended, of, channels, results, FIXED)
        position, request, begins = behind(piece, request, begins, step.kv_heads * ROW_TILES)


@gluon.jit(
    do_not_specialize=["requests", "kv_heads", "min_tiles", "window", "sink_tokens", "table_row"]
)
def drafts_kernel(
    q,
    k_pages,
    v_pages,
    k_scale,
    v_scale,
    k_zero,
    v_zero,
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
    kv_heads,
    min_tiles,
    window,
    sink_tokens,
    q_token,
    q_head,
    k_page,
    k_head,
    v_page,
    v_head,
    k_scale_page,
    k_scale_head,
    v_scale_page,
    v_scale_head,
    table_row,
    out_token,
    out_head,
    K_CODE: gl.constexpr,
    V_CODE: gl.constexpr,
    K_SCALES: gl.constexpr,
    V_SCALES: gl.constexpr,
    K_ZERO: gl.constexpr,
    V_ZERO: gl.constexpr,
    K_SHARED: gl.constexpr,
    V_SHARED: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    GROUP: gl.constexpr,
    PAGE: gl.constexpr,
    ROWS: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TILE: gl.constexpr,
    FULL: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENT: gl.constexpr,
    SOFTCAP: gl.constexpr,
    SINKS: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
    PIECES: gl.constexpr,
):
    """Arguments as in triton_kernel.decode_kernel, but pages of codes, and of scales and zeros that
    tokens have, as TMA descriptors (gluon_drafts_operands.Half), which have their strides. ROWS 64
    or 32, TILE 64, HEAD_DIM and VALUE_DIM 128, PAGE a multiple of 64.
    """
    gl.static_assert((ROWS == 64 or ROWS == 32) and TILE == 64 and PAGE % TILE == 0)
    gl.static_assert(K_CODE != FP8)
    # int8 keys are multiplied where the copies left them, 4-bit ones where threads put them.
    K_ROW: gl.constexpr = HEAD_DIM // 2 if K_CODE == INT4 else HEAD_DIM
    V_ROW: gl.constexpr = VALUE_DIM // 2 if V_CODE == INT4 else VALUE_DIM
    keys = half_of(k_pages, k_scale, k_zero, STAGES, TILE, K_ROW, K_SCALES, K_ZERO)
    values = half_of(v_pages, v_scale, v_zero, STAGES, TILE, V_ROW, V_SCALES, V_ZERO)
    turns = turns_of(STAGES)
    if K_CODE == INT8:
        k_smem = in_ring(keys.codes)
    else:
        k_smem = gl.allocate_shared_memory(
            gl.int8, [2, TILE, HEAD_DIM], ring_layout(TILE, HEAD_DIM, gl.int8)
        )
    v_smem = gl.allocate_shared_memory(
        gl.float16, [2, TILE, VALUE_DIM], ring_layout(TILE, VALUE_DIM, gl.float16)
    )
    q_smem = gl.allocate_shared_memory(
        gl.int8, [2, 64, HEAD_DIM], ring_layout(64, HEAD_DIM, gl.int8)
    )
    of_keys = key_numbers_memory(TILE)
    far_smem = gl.allocate_shared_memory(gl.int32, [2, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()

    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start, end, share, request, begins, even = my_share(
        query_starts, context_lens, requests, kv_heads * ROW_TILES, min_tiles, window,
        sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK,
    )  # fmt: skip
    start, end, share = same(start), same(end), same(share)
    request, begins = same(request), same(begins)
    FIXED: gl.constexpr = fixed_of(
        K_CODE, V_CODE, K_SCALES, V_SCALES, K_ZERO, V_ZERO, K_SHARED, V_SHARED, HEAD_DIM, VALUE_DIM,
        GROUP, PAGE, ROWS, ROW_TILES, TILE, FULL, WINDOW, SEGMENT, SOFTCAP, SINKS, STAGES, PIECES,
    )  # fmt: skip
    line = Share(start, end, share, request, begins, even)
    step = Step(query_starts, context_lens, kv_heads, window, sink_tokens)
    _roles(
        (
            keys, values, turns, (q_smem, k_smem, v_smem, of_keys, far_smem), line, step,
            Queries(q, q_token, q_head, softmax_scale, softcap),
            OfChannels(k_scale, v_scale, k_zero, v_zero, k_scale_head, v_scale_head),
            Results(out, lse, part_out, part_lse, cuts, sinks, out_token, out_head), FIXED,
        ),
        (keys, values, turns, page_table, table_row, line, step, FIXED),
    )  # fmt: skip


@gluon.jit
def _roles(multiply, copy):
    """A warpgroup that multiplies, and a warp that copies for it."""
    gl.warp_specialize([(_multiply, multiply), (_copy, copy)], [1], [COPY_REGISTERS])
