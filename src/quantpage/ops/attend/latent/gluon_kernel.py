"""Decode over latent rows on Hopper: keys by queries, a tile of codes read once for both products.

    S [keys, rows]     = K [keys, channels] q [channels, rows]      wgmma, K from registers
    O [channels, rows] = K' [channels, keys] p [keys, rows]         mma or wgmma, as K'

It is decode/gluon_kernel for rows that are keys and values: the same anchors, plan, cut rows and
masks. A tile of 64 rows comes by asynchronous copy into a ring; threads take it from there twice,
in the order of either product, a part of its channels at a time (gluon_operands), so that neither a
tile of codes nor of numbers has to fit into registers beside the output.

Up to 32 query rows the second product is mma, which reads p without a proxy fence; 64 have two
warpgroups and wgmma, whose rate is worth what the fence waits for the copies under way.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_kernel import FAR, FLOOR, SHIFT, log2_fast
from quantpage.ops.attend.decode.gluon_operands import copy_layout, halved, shared_layout
from quantpage.ops.attend.decode.gluon_rows import (
    capped,
    find_piece,
    row_sums,
    seen_pairs,
    store_cut,
    with_sink,
)
from quantpage.ops.attend.decode.gluon_share import (
    copy_codes,
    here,
    keys_of_all,
    my_share,
    page_of,
    same,
    shown_keys,
    tile_at,
    token_plane,
)
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.attend.latent.gluon_operands import (
    PART,
    Hidden,
    far_bits,
    key_part,
    load_queries,
    ordered,
    query_layout,
    score_of,
    value_part,
)
from quantpage.ops.triton.common import FP8, LN2, LOG2E
from quantpage.ops.triton.gluon_compat import (
    async_copy,
    fence_async_shared,
    mma_v2,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit(do_not_specialize=["requests", "min_tiles", "window", "sink_tokens", "table_row"])
def decode_kernel(
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
    CODE: gl.constexpr,
    ROW_DIM: gl.constexpr,
    ROTARY_DIM: gl.constexpr,
    HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    ROWS: gl.constexpr,
    ROW_TILES: gl.constexpr,
    FULL: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
    SINKS: gl.constexpr,
    CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Arguments as in triton_kernel.decode_kernel; codes as 32-bit words."""
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = WARPS // 4
    TILE: gl.constexpr = 64
    WORDS: gl.constexpr = ROW_DIM // 4
    ROTARY_WORDS: gl.constexpr = ROTARY_DIM // 4
    PARTS: gl.constexpr = ROW_DIM // PART
    # Integer keys are multiplied as bytes, those of fp8 from words.
    BYTES: gl.constexpr = CODE != FP8
    KEY: gl.constexpr = gl.int8 if BYTES else gl.int32
    EACH: gl.constexpr = 1 if BYTES else 4
    Q_NUMBER: gl.constexpr = gl.int8 if BYTES else gl.float16
    Q_ROWS: gl.constexpr = 2 * ROWS if BYTES else ROWS
    row_copy: gl.constexpr = copy_layout(WORDS, gl.int32, WARPS)
    rotary_copy: gl.constexpr = copy_layout(ROTARY_WORDS, gl.int32, WARPS)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, GROUPS], [16, ROWS // GROUPS, 16]
    )
    byte_score: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, GROUPS], [16, Q_ROWS // GROUPS, 32]
    )
    product: gl.constexpr = byte_score if BYTES else s_layout
    k_operand: gl.constexpr = gl.DotOperandLayout(0, product, 4 if BYTES else 2)
    s_keys: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_rows: gl.constexpr = gl.SliceLayout(0, s_layout)
    WIDE: gl.constexpr = ROWS == 64
    o_layout: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 16])
        if WIDE
        else gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    )
    o_rows: gl.constexpr = gl.SliceLayout(0, o_layout)
    v_operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    p_operand: gl.constexpr = gl.DotOperandLayout(1, o_layout, 2)
    # Words of a part of the second product.
    V_WORDS: gl.constexpr = 8 * WARPS
    V_PARTS: gl.constexpr = WORDS // V_WORDS
    q_rows: gl.constexpr = gl.SliceLayout(1, query_layout(PART, WARPS))

    row_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES, TILE, WORDS], shared_layout(WORDS, gl.int32)
    )
    rotary_ring = gl.allocate_shared_memory(
        gl.int32, [STAGES, TILE, ROTARY_WORDS], shared_layout(ROTARY_WORDS, gl.int32)
    )
    row_keys = row_ring._reinterpret(
        KEY, [STAGES, TILE, ROW_DIM // EACH], shared_layout(ROW_DIM // EACH, KEY)
    )
    rotary_keys = rotary_ring._reinterpret(
        KEY, [STAGES, TILE, ROTARY_DIM // EACH], shared_layout(ROTARY_DIM // EACH, KEY)
    )
    q_smem = gl.allocate_shared_memory(
        Q_NUMBER, [PARTS, Q_ROWS, PART],
        gl.NVMMASharedLayout.get_default_for([Q_ROWS, PART], Q_NUMBER),
    )  # fmt: skip
    turned_smem = gl.allocate_shared_memory(
        Q_NUMBER, [Q_ROWS, ROTARY_DIM],
        gl.NVMMASharedLayout.get_default_for([Q_ROWS, ROTARY_DIM], Q_NUMBER),
    )  # fmt: skip
    p_smem = gl.allocate_shared_memory(
        gl.float16, [TILE, ROWS], gl.NVMMASharedLayout.get_default_for([TILE, ROWS], gl.float16)
    )
    far_smem = gl.allocate_shared_memory(gl.int32, [WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    far_layout: gl.constexpr = gl.BlockedLayout([WARPS], [32], [WARPS], [0])

    program = gl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start, end, share, request, begins, even = my_share(
        query_starts, context_lens, requests, ROW_TILES, min_tiles, window, sink_tokens, PAGE, TILE,
        FULL, WINDOW, ALL_KEYS, CHUNK,
    )  # fmt: skip
    start, end, share = same(start), same(end), same(share)
    request, begins = same(request), same(begins)
    position = start
    while position < end:
        (
            context, q_start, q_len, a_low, a_high, b_low, b_high, a_first, a_tiles, b_first, tiles,
            item, first_tile, last_tile,
        ) = find_piece(
            query_starts, context_lens, request, begins, position, end, window, sink_tokens, PAGE,
            TILE, FULL, WINDOW, ALL_KEYS,
        )  # fmt: skip
        if last_tile > first_tile:
            row_first = item * ROWS
            table = page_table + request.to(gl.int64) * table_row
            last_key = context - 1

            for i in gl.static_range(STAGES):
                t = first_tile + i
                if t < last_tile:
                    key_start = tile_at(t, a_first, a_tiles, b_first, WINDOW, ALL_KEYS) * TILE
                    page = page_of(
                        table, t, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW, ALL_KEYS
                    )
                    copy_codes(
                        row_ring.index(i), row_codes, row_page, page, table, key_start, last_key,
                        PAGE, TILE, WORDS, row_copy,
                    )  # fmt: skip
                    copy_codes(
                        rotary_ring.index(i), rotary_codes, rotary_page, page, table, key_start,
                        last_key, PAGE, TILE, ROTARY_WORDS, rotary_copy,
                    )  # fmt: skip
                async_copy.commit_group()
            key_start = tile_at(first_tile, a_first, a_tiles, b_first, WINDOW, ALL_KEYS) * TILE
            page = page_of(
                table, first_tile, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW,
                ALL_KEYS,
            )  # fmt: skip
            next_scale = token_plane(
                row_scale, row_scale_page, page, table, key_start, last_key, PAGE, TILE, s_keys
            )
            next_other = token_plane(
                rotary_scale, rotary_scale_page, page, table, key_start, last_key, PAGE, TILE,
                s_keys,
            )  # fmt: skip
            next_page = page_of(
                table, first_tile + 1, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW,
                ALL_KEYS,
            )  # fmt: skip
            ahead_page = page_of(
                table, first_tile + STAGES, last_tile, a_first, a_tiles, b_first, PAGE, TILE,
                WINDOW, ALL_KEYS,
            )  # fmt: skip

            q_row = row_first + gl.arange(0, ROWS, q_rows)
            q_at = (q_start + q_row // HEADS).to(gl.int64) * q_token
            q_at += (q_row % HEADS).to(gl.int64) * q_head
            natural: gl.constexpr = 1.0 if SOFTCAP else LOG2E
            factor = load_queries(
                q_smem, turned_smem, q + q_at, q_row < q_len * HEADS, ROW_DIM, ROTARY_DIM, CODE,
                WARPS,
            )  # fmt: skip
            factor = gl.convert_layout(factor, s_rows) * (softmax_scale * natural)
            fence_async_shared()

            first_seat = context - q_len
            all_low, all_high = keys_of_all(
                context, first_seat, window, PAGE, FULL, WINDOW, ALL_KEYS
            )
            anchor = gl.full([ROWS], FLOOR, gl.float32, s_rows)
            weights = halved(gl.full([TILE, ROWS], 0.0, gl.float32, s_layout), ROWS)
            no_score = gl.full([TILE, Q_ROWS], 0, gl.int32 if BYTES else gl.float32, product)
            acc0 = gl.full([4 * V_WORDS, ROWS], 0.0, gl.float32, o_layout)
            acc1 = acc0
            acc2 = acc0
            acc3 = acc0

            stage = 0
            for t in range(first_tile, last_tile):
                async_copy.wait_group(STAGES - 1)
                # Everybody's copies of this tile are in.
                thread_barrier()
                scale, other = next_scale.to(gl.float32), next_other.to(gl.float32)
                following = gl.minimum(t + 1, last_tile - 1)
                next_start = tile_at(following, a_first, a_tiles, b_first, WINDOW, ALL_KEYS) * TILE
                next_scale = token_plane(
                    row_scale, row_scale_page, next_page, table, next_start, last_key, PAGE, TILE,
                    s_keys,
                )  # fmt: skip
                next_other = token_plane(
                    rotary_scale, rotary_scale_page, next_page, table, next_start, last_key, PAGE,
                    TILE, s_keys,
                )  # fmt: skip
                next_page = page_of(
                    table, t + 2, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW, ALL_KEYS
                )

                # Triton 3.6 waits for no asynchronous product of bytes from registers.
                k = key_part(rotary_keys.index(stage), CODE, WARPS, k_operand)
                s = warpgroup_mma(k, turned_smem.permute((1, 0)), no_score, use_acc=False)
                score = score_of(s, CODE, GROUPS, s_layout) * other[:, None]
                s = no_score
                for i in gl.static_range(PARTS):
                    part = row_keys.index(stage).slice(i * (PART // EACH), PART // EACH, dim=1)
                    k = key_part(part, CODE, WARPS, k_operand)
                    s = warpgroup_mma(k, q_smem.index(i).permute((1, 0)), s, use_acc=i > 0)
                score += score_of(s, CODE, GROUPS, s_layout) * scale[:, None]
                score = score * factor[None, :]
                if SOFTCAP:
                    score = capped(score, softcap)
                log_scale = log2_fast(gl.maximum(scale, 1e-30))
                heavy = score + log_scale[:, None]
                if (key_start < all_low) | (key_start + TILE > all_high):
                    key = key_start + gl.arange(0, TILE, s_keys)
                    shown = shown_keys(
                        key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens,
                        WINDOW, ALL_KEYS,
                    )  # fmt: skip
                    seen = seen_pairs(
                        key, shown, row_first, s_rows, first_seat, q_len, window, sink_tokens, PAGE,
                        ROWS, HEADS, FULL, WINDOW, ALL_KEYS,
                    )  # fmt: skip
                    heavy = gl.where(seen, heavy, float("-inf"))
                    # Where a key is hidden p is 0: what it is multiplied by has to be finite.
                    log_scale = gl.where(shown & (log_scale < float("inf")), log_scale, 0.0)
                x = heavy - anchor[None, :]
                p = gl.exp2(x)
                p_smem.store(p.to(gl.float16))
                far_smem.store(far_bits(x, GROUPS))
                if WIDE:
                    fence_async_shared()
                # P is there.
                thread_barrier()
                if gl.max(far_smem.load(far_layout), 0) > FAR:
                    old = anchor
                    anchor = gl.maximum(anchor, gl.max(heavy, 0) - SHIFT)
                    shrink = gl.exp2(old - anchor)
                    weights = (
                        weights
                        * gl.convert_layout(
                            shrink, gl.SliceLayout(0, gl.SliceLayout(1, weights.type.layout))
                        )[None, None, :]
                    )
                    less = gl.convert_layout(shrink, o_rows)[None, :]
                    acc0 = acc0 * less
                    acc1 = acc1 * less
                    if V_PARTS > 2:
                        acc2 = acc2 * less
                        acc3 = acc3 * less
                    p = gl.exp2(heavy - anchor[None, :])
                    p_smem.store(p.to(gl.float16))
                    if WIDE:
                        fence_async_shared()
                    thread_barrier()
                # p is of p * scale; the row's weight is of p.
                weights += halved(p * gl.exp2(-log_scale)[:, None], ROWS)
                hidden = Hidden(
                    key_start, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens
                )
                mine = row_ring.index(stage)
                if WIDE:
                    # A quarter of the tile at a time: one is unpacked while the one before is
                    # multiplied.
                    first, second = p_smem.slice(0, 32), p_smem.slice(32, 32)
                    v = value_part(mine, 0, 32, 0, hidden, CODE, WINDOW, v_operand)
                    acc0 = warpgroup_mma(v, first, acc0, is_async=True)
                    w = value_part(mine, 0, 32, 1, hidden, CODE, WINDOW, v_operand)
                    acc1 = warpgroup_mma(w, first, acc1, is_async=True)
                    acc0, v = warpgroup_mma_wait(1, deps=(acc0, v))
                    v = value_part(mine, 32, 32, 0, hidden, CODE, WINDOW, v_operand)
                    acc0 = warpgroup_mma(v, second, acc0, is_async=True)
                    acc1, w = warpgroup_mma_wait(1, deps=(acc1, w))
                    w = value_part(mine, 32, 32, 1, hidden, CODE, WINDOW, v_operand)
                    acc1 = warpgroup_mma(w, second, acc1, is_async=True)
                    acc0, acc1, v, w = warpgroup_mma_wait(0, deps=(acc0, acc1, v, w))
                else:
                    heavy_p = p_smem.load(p_operand)
                    v = value_part(mine, 0, TILE, 0, hidden, CODE, WINDOW, v_operand)
                    acc0 = mma_v2(v, heavy_p, acc0)
                    v = value_part(mine, 0, TILE, 1, hidden, CODE, WINDOW, v_operand)
                    acc1 = mma_v2(v, heavy_p, acc1)
                    if V_PARTS > 2:
                        v = value_part(mine, 0, TILE, 2, hidden, CODE, WINDOW, v_operand)
                        acc2 = mma_v2(v, heavy_p, acc2)
                        v = value_part(mine, 0, TILE, 3, hidden, CODE, WINDOW, v_operand)
                        acc3 = mma_v2(v, heavy_p, acc3)
                # Everybody has this tile's codes.
                thread_barrier()
                ahead = t + STAGES
                if ahead < last_tile:
                    ahead_tile = tile_at(ahead, a_first, a_tiles, b_first, WINDOW, ALL_KEYS)
                    copy_codes(
                        row_ring.index(stage), row_codes, row_page, ahead_page, table,
                        ahead_tile * TILE, last_key, PAGE, TILE, WORDS, row_copy,
                    )  # fmt: skip
                    copy_codes(
                        rotary_ring.index(stage), rotary_codes, rotary_page, ahead_page, table,
                        ahead_tile * TILE, last_key, PAGE, TILE, ROTARY_WORDS, rotary_copy,
                    )  # fmt: skip
                    ahead_page = page_of(
                        table, ahead + 1, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW,
                        ALL_KEYS,
                    )  # fmt: skip
                async_copy.commit_group()
                key_start = next_start
                stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            async_copy.wait_group(0)
            row = here(row_first) + gl.arange(0, ROWS, s_rows)
            real = row < q_len * HEADS
            token_at = (q_start + row // HEADS).to(gl.int64)
            head = row % HEADS
            complete = (first_tile == 0) & (last_tile == tiles)
            _, row_lse, ratio = row_sums(weights, anchor, s_rows)
            slot_id = 2 * program + (position != start).to(gl.int32)
            if first_tile == 0:
                cut = cuts + (request * ROW_TILES + item) * 2
                store_cut(cut, complete, slot_id, program, position, tiles, share, even)
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
                    acc * ratio[None, :], complete, out, part_out, q_start, q_len, row_first,
                    slot_id, out_token, out_head, i * 4 * V_WORDS, ROW_DIM, HEADS, WARPS,
                )  # fmt: skip
        position += last_tile - first_tile
        if position - begins >= tiles * ROW_TILES:
            request += 1
            begins = position


@gluon.jit
def _store(
    acc, complete, out, part_out, q_start, q_len, row_first, slot_id, out_token, out_head,
    FIRST: gl.constexpr, ROW_DIM: gl.constexpr, HEADS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """A part of the output, channels from FIRST on, to the result or to a piece."""
    o = ordered(acc, WARPS)
    layout: gl.constexpr = o.type.layout
    channel = FIRST + gl.arange(0, o.shape[1], gl.SliceLayout(0, layout))
    nth = gl.arange(0, o.shape[0], gl.SliceLayout(1, layout))
    row = row_first + nth
    keep = (row < q_len * HEADS)[:, None]
    if complete:
        at = (q_start + row // HEADS).to(gl.int64) * out_token
        at += (row % HEADS).to(gl.int64) * out_head
        made = o.to(out.dtype.element_ty)
        gl.store(out + at[:, None] + channel[None, :], made, mask=keep)
    else:
        at = (slot_id.to(gl.int64) * acc.shape[1] + nth) * ROW_DIM
        gl.store(part_out + at[:, None] + channel[None, :], o, mask=keep)
