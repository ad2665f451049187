"""Decode of many query rows on Hopper: rows by keys, one warpgroup a program.

    S [rows, keys]     = q [rows, channels] K [channels, keys]      wgmma, both from shared memory
    O [rows, channels] = p [rows, keys] V [keys, channels]          wgmma, p from registers

A program has 64 query rows, as many as the tensor cores take at once, where gluon_kernel, which
multiplies keys by rows, holds scores of more than 32 in more registers than a thread has. Rows lie
side by side with what belongs to them: a probability is an operand where it was made, and no warp
waits for another's. Codes come by TMA, which needs no thread's time and lets a proxy fence wait for
no copy; threads take them from the ring once, and put what is multiplied beside it
(gluon_drafts_operands). What belongs to a key (the logarithm of its scale, one over it) is worked
out by one thread and read by all.

    threads        p of t | numbers of t+1 | softmax of t+1 ..
    tensor cores   S t+1    | O += t       |

A tile has two barriers: before p is multiplied everybody's numbers have to be there, and before
they are stored anew everybody's products have to be over. Anchors, the plan, cut rows, masks and
their names are those of gluon_kernel.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_drafts_operands import (
    Shown,
    copy_tile,
    expect_tile,
    half_of,
    in_order,
    key_numbers,
    key_numbers_memory,
    log_scale,
    planes,
    ring_layout,
    scores,
    seen_keys,
    store_early,
    store_late,
    store_queries,
    take,
    value_numbers,
)
from quantpage.ops.attend.decode.gluon_ends import end_outputs, end_sums
from quantpage.ops.attend.decode.gluon_kernel import FLOOR, SHIFT, SLACK
from quantpage.ops.attend.decode.gluon_rows import (
    capped,
    find_piece,
    lane_sums,
    seen_rows,
)
from quantpage.ops.attend.decode.gluon_share import (
    keys_of_all,
    my_share,
    page_of,
    same,
    tile_at,
)
from quantpage.ops.attend.flash.gluon_parts import stage_of
from quantpage.ops.triton.common import A_TOKEN, FP8, INT4, INT8, LOG2E, STATIC
from quantpage.ops.triton.gluon_compat import (
    fence_async_shared,
    mbarrier,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _by_lane(x):
    """[rows, keys] summed over the keys of a thread: [rows, lanes of a row]."""
    ROWS: gl.constexpr = x.shape[0]
    return gl.sum(gl.sum(gl.reshape(x, [ROWS, x.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _peaks(x):
    """The largest of each row's keys that a thread has, [rows, lanes of a row]."""
    ROWS: gl.constexpr = x.shape[0]
    return gl.max(gl.max(gl.reshape(x, [ROWS, x.shape[1] // 8, 4, 2]), 3), 1)


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
    tokens have, as TMA descriptors (gluon_drafts_operands.Half), which have their strides. ROWS and
    TILE 64, HEAD_DIM and VALUE_DIM 128, PAGE a multiple of 64.
    """
    gl.static_assert(ROWS == 64 and TILE == 64 and PAGE % TILE == 0)
    gl.static_assert(K_CODE != FP8)
    # int8 keys are multiplied where the copies left them, 4-bit ones where threads put them.
    AS_COPIED: gl.constexpr = K_CODE == INT8
    K_ROW: gl.constexpr = HEAD_DIM // 2 if K_CODE == INT4 else HEAD_DIM
    V_ROW: gl.constexpr = VALUE_DIM // 2 if V_CODE == INT4 else VALUE_DIM
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    p_operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_keys: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    a_key: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    q_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )
    far_layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])

    keys = half_of(k_pages, k_scale, k_zero, STAGES, TILE, K_ROW, K_SCALES, K_ZERO)
    values = half_of(v_pages, v_scale, v_zero, STAGES, TILE, V_ROW, V_SCALES, V_ZERO)
    k_ring = keys.codes._reinterpret(
        k_pages.dtype, [STAGES, TILE, K_ROW], ring_layout(TILE, K_ROW, k_pages.dtype)
    )
    v_ring = values.codes._reinterpret(
        v_pages.dtype, [STAGES, TILE, V_ROW], ring_layout(TILE, V_ROW, v_pages.dtype)
    )
    if AS_COPIED:
        k_smem = k_ring
    else:
        k_smem = gl.allocate_shared_memory(
            gl.int8, [1, TILE, HEAD_DIM], ring_layout(TILE, HEAD_DIM, gl.int8)
        )
    v_smem = gl.allocate_shared_memory(
        gl.float16, [TILE, VALUE_DIM], ring_layout(TILE, VALUE_DIM, gl.float16)
    )
    q_smem = gl.allocate_shared_memory(
        gl.int8, [2, ROWS, HEAD_DIM], ring_layout(ROWS, HEAD_DIM, gl.int8)
    )
    of_keys = key_numbers_memory(TILE)
    far_smem = gl.allocate_shared_memory(gl.int32, [4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()
    thread_barrier()

    program = gl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start, end, share, request, begins, even = my_share(
        query_starts, context_lens, requests, kv_heads * ROW_TILES, min_tiles, window,
        sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK,
    )  # fmt: skip
    start, end, share = same(start), same(end), same(share)
    request, begins = same(request), same(begins)
    position = start
    # Tiles of this program before: where the next one lies in the ring.
    count = 0
    while position < end:
        (
            context, q_start, q_len, a_low, a_high, b_low, b_high, a_first, a_tiles, b_first, tiles,
            item, first_tile, last_tile,
        ) = find_piece(
            query_starts, context_lens, request, begins, position, end, window, sink_tokens, PAGE,
            TILE, FULL, WINDOW, SEGMENT,
        )  # fmt: skip
        if last_tile > first_tile:
            nth_head = item // ROW_TILES
            head = nth_head.to(gl.int64)
            row_first = (item % ROW_TILES) * ROWS
            table = page_table + request.to(gl.int64) * table_row
            for i in gl.static_range(STAGES):
                stage, _ = stage_of(count + i, STAGES)
                expect_tile(keys, stage, first_tile + i < last_tile, K_SCALES, K_ZERO)
                expect_tile(values, stage, first_tile + i < last_tile, V_SCALES, V_ZERO)
            for i in gl.static_range(STAGES):
                t = gl.minimum(first_tile + i, last_tile - 1)
                slot = tile_at(t, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE % PAGE
                page = page_of(
                    table, t, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW, SEGMENT
                )
                stage, _ = stage_of(count + i, STAGES)
                some = first_tile + i < last_tile
                copy_tile(
                    keys, values, stage, some, page, nth_head, slot, K_SCALES, V_SCALES, K_ZERO,
                    V_ZERO,
                )  # fmt: skip

            q_row = row_first + gl.arange(0, ROWS, gl.SliceLayout(1, q_layout))
            channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, q_layout))
            q_at = (q_start + q_row // GROUP).to(gl.int64) * q_token
            q_at += (head * GROUP + q_row % GROUP) * q_head
            q_real = (q_row < q_len * GROUP)[:, None]
            asked = gl.load(q + q_at[:, None] + channel[None, :], mask=q_real, other=0.0)

            key_start = tile_at(first_tile, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
            none = gl.full([TILE], 0.0, gl.float32, a_key)
            ahead_page = page_of(
                table, first_tile + STAGES, last_tile, a_first, a_tiles, b_first, PAGE, TILE,
                WINDOW, SEGMENT,
            )  # fmt: skip

            asked = asked.to(gl.float32)
            terms = asked
            if K_SCALES == STATIC:
                static_at = head * k_scale_head + channel // K_SHARED
                if K_ZERO:
                    terms = asked * gl.load(k_zero + static_at).to(gl.float32)[None, :]
                asked = asked * gl.load(k_scale + static_at).to(gl.float32)[None, :]
            natural: gl.constexpr = 1.0 if SOFTCAP else LOG2E
            factor, less = store_queries(q_smem, asked, K_CODE, s_rows)
            factor = factor * (softmax_scale * natural)
            less = less * (softmax_scale * natural)
            q_sum = gl.convert_layout(gl.sum(terms, 1), s_rows) * (softmax_scale * natural)

            first_seat = context - q_len
            all_low, all_high = keys_of_all(
                context, first_seat, window, PAGE, FULL, WINDOW, SEGMENT
            )
            shown = Shown(a_low, a_high, b_low, b_high, first_seat, window, sink_tokens)
            anchor = gl.full([ROWS], FLOOR, gl.float32, s_rows)
            weights = _by_lane(gl.full([ROWS, TILE], 0.0, gl.float32, s_layout))
            offsets = weights
            no_score = gl.full([ROWS, TILE], 0, gl.int32, product)
            acc = gl.full([ROWS, VALUE_DIM], 0.0, gl.float32, o_layout)

            # The first tile's numbers and scores, and the second's keys.
            stage, phase = stage_of(count, STAGES)
            mbarrier.wait(keys.landed.index(stage), phase)
            mbarrier.wait(values.landed.index(stage), phase)
            if not AS_COPIED:
                k_smem.index(0).store(key_numbers(take(k_ring.index(stage))))
            v_codes = take(v_ring.index(stage))
            v_smem.store(value_numbers(v_codes, key_start, shown, V_CODE, WINDOW, SEGMENT))
            ks, kz = planes(keys, stage, none, a_key, K_SCALES, K_ZERO)
            vs, vz = planes(values, stage, none, a_key, V_SCALES, V_ZERO)
            log_vs = log_scale(vs)
            seen = seen_keys(key_start + gl.arange(0, TILE, a_key), shown, WINDOW, SEGMENT)
            store_early(of_keys, ks, kz, log_vs, seen, K_SCALES, V_SCALES, K_ZERO)
            store_late(of_keys, vz, log_vs, seen, V_SCALES, V_ZERO)
            fence_async_shared()
            thread_barrier()
            high, low = scores(q_smem, k_smem.index(stage if AS_COPIED else 0), no_score)
            high, low = warpgroup_mma_wait(0, deps=(high, low))
            # Everybody's product is over.
            thread_barrier()
            if not AS_COPIED:
                stage, phase = stage_of(count + 1, STAGES)
                mbarrier.wait(keys.landed.index(stage), phase, pred=first_tile + 1 < last_tile)
                k_smem.index(0).store(key_numbers(take(k_ring.index(stage))))

            for t in range(first_tile, last_tile):
                score = (high * 128 + low).to(gl.float32)
                score = gl.convert_layout(score, s_layout, assert_trivial=True) * factor[:, None]
                if K_CODE == INT4:
                    score += less[:, None]
                if K_SCALES == A_TOKEN:
                    score = score * of_keys.k_scale.load(s_keys)[None, :]
                    if K_ZERO:
                        score += q_sum[:, None] * of_keys.k_zero.load(s_keys)[None, :]
                else:
                    if K_ZERO:
                        score += q_sum[:, None]
                if SOFTCAP:
                    score = capped(score, softcap)
                heavy = score
                if V_SCALES == A_TOKEN:
                    heavy = score + of_keys.log_v_scale.load(s_keys)[None, :]
                if (key_start < all_low) | (key_start + TILE > all_high):
                    key = key_start + gl.arange(0, TILE, s_keys)
                    visible = seen_rows(
                        key, shown, row_first, s_rows, q_len, PAGE, ROWS, GROUP, FULL, WINDOW,
                        SEGMENT,
                    )  # fmt: skip
                    heavy = gl.where(visible, heavy, float("-inf"))
                peak = _peaks(heavy)
                lanes: gl.constexpr = gl.SliceLayout(1, peak.type.layout)
                above = peak - gl.convert_layout(anchor + (SHIFT + SLACK), lanes)[:, None]
                bits = gl.reshape(above.to(gl.int32, bitcast=True), [4, ROWS])
                far_smem.store(gl.max(bits, 1))
                stage, phase = stage_of(count + 1, STAGES)
                if AS_COPIED:
                    mbarrier.wait(keys.landed.index(stage), phase, pred=t + 1 < last_tile)
                mbarrier.wait(values.landed.index(stage), phase, pred=t + 1 < last_tile)
                after, after_phase = stage_of(count + 2, STAGES)
                if not AS_COPIED:
                    mbarrier.wait(keys.landed.index(after), after_phase, pred=t + 2 < last_tile)
                fence_async_shared()
                # This tile's values and the next one's keys are there.
                thread_barrier()
                # Of the tile past the last what lies there is multiplied, and nobody reads it.
                high, low = scores(q_smem, k_smem.index(stage if AS_COPIED else 0), no_score)
                if gl.max(far_smem.load(far_layout), 0) > 0:
                    old = anchor
                    anchor = gl.maximum(anchor, gl.max(heavy, 1) - SHIFT)
                    shrink = gl.exp2(old - anchor)
                    lessened = gl.convert_layout(shrink, lanes)[:, None]
                    weights = weights * lessened
                    if V_ZERO and V_SCALES == A_TOKEN:
                        offsets = offsets * lessened
                    acc = acc * gl.convert_layout(shrink, o_rows)[:, None]
                p = gl.exp2(heavy - anchor[:, None])
                if V_SCALES == A_TOKEN:
                    # p is of p * v_scale; the row's weight is of p.
                    weights += _by_lane(p * of_keys.light.load(s_keys)[None, :])
                    if V_ZERO:
                        offsets += _by_lane(p * of_keys.light_zero.load(s_keys)[None, :])
                else:
                    weights += _by_lane(p)
                p16 = gl.convert_layout(p.to(gl.float16), p_operand)
                acc = warpgroup_mma(p16, v_smem, acc, is_async=True)

                following = gl.minimum(t + 1, last_tile - 1)
                key_start = tile_at(following, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
                v_codes = take(v_ring.index(stage))
                if not AS_COPIED:
                    codes = take(k_ring.index(after))
                ks, kz = planes(keys, stage, none, a_key, K_SCALES, K_ZERO)
                vs, vz = planes(values, stage, none, a_key, V_SCALES, V_ZERO)
                log_vs = log_scale(vs)
                seen = seen_keys(key_start + gl.arange(0, TILE, a_key), shown, WINDOW, SEGMENT)
                store_early(of_keys, ks, kz, log_vs, seen, K_SCALES, V_SCALES, K_ZERO)
                # The place of this tile, which everybody has read.
                here_stage, _ = stage_of(count, STAGES)
                ahead = t + STAGES
                some = ahead < last_tile
                expect_tile(keys, here_stage, some, K_SCALES, K_ZERO)
                expect_tile(values, here_stage, some, V_SCALES, V_ZERO)
                acc, high, low, p16 = warpgroup_mma_wait(0, deps=(acc, high, low, p16))
                fence_async_shared()
                # Everybody's products are over, and everybody has the next tile's codes.
                thread_barrier()
                slot = tile_at(ahead, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE % PAGE
                copy_tile(
                    keys, values, here_stage, some, ahead_page, nth_head, slot, K_SCALES, V_SCALES,
                    K_ZERO, V_ZERO,
                )  # fmt: skip
                ahead_page = page_of(
                    table, ahead + 1, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW,
                    SEGMENT,
                )  # fmt: skip
                v_smem.store(value_numbers(v_codes, key_start, shown, V_CODE, WINDOW, SEGMENT))
                if not AS_COPIED:
                    k_smem.index(0).store(key_numbers(codes))
                store_late(of_keys, vz, log_vs, seen, V_SCALES, V_ZERO)
                count += 1
            # What nobody reads is stored, too: the next row's comes to the same place.
            thread_barrier()
            ended = end_sums(
                weights, anchor, s_rows, lane_sums, row_first, q_start, q_len, head, kv_heads,
                first_tile, last_tile, tiles, program, position, start, request, item, share, even,
                cuts, sinks, lse, part_lse, GROUP, ROWS, ROW_TILES, SINKS, PIECES,
            )  # fmt: skip
            ratio = ended.ratio
            o = acc * gl.convert_layout(ratio, o_rows)[:, None]
            if V_ZERO and V_SCALES == A_TOKEN:
                moved = gl.convert_layout(gl.sum(offsets, 1), s_rows) * ratio
                o += gl.convert_layout(moved, o_rows)[:, None]
            end_outputs(
                in_order(o, V_CODE), ended.total * ratio, ended, row_first, q_start, q_len, head,
                v_scale, v_zero, v_scale_head, out, part_out, out_token, out_head, GROUP, V_SCALES,
                V_ZERO, V_SHARED,
            )  # fmt: skip
        position += last_tile - first_tile
        if position - begins >= tiles * kv_heads * ROW_TILES:
            request += 1
            begins = position
