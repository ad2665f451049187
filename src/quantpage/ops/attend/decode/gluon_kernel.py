"""Decode on Hopper: keys by queries on the warpgroup's tensor cores, one warpgroup a program.

    S [keys, rows]     = K [keys, channels] q [channels, rows]      wgmma, K from registers
    O [channels, rows] = V [channels, keys] p [keys, rows]          mma, V from registers

Codes come by asynchronous copy and are unpacked in registers, where they are the first operand: 8
to 64 query rows cost the same unpacking (gluon_operands). Warps share the keys in the first
product and the channels in the second, so that p crosses warps through shared memory and each
warp's outputs are whole. mma reads p there without the proxy fence that wgmma would need: that
fence waits for every copy under way.

A row's scores are taken from an anchor: its largest p * v_scale when the anchor was set, less
SHIFT. It follows only where a score is more than SLACK above that, since p would leave float16. So
most tiles reduce one flag instead of a maximum a row. The plan, cut rows, masks and their names are
those of triton_kernel.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_ends import end_outputs, end_sums
from quantpage.ops.attend.decode.gluon_operands import (
    byte_layout,
    byte_operand,
    copy_layout,
    halved,
    in_order,
    key_layout,
    key_operand,
    shared_layout,
    store_queries,
    unpack,
    value_layout,
    value_operand,
    whole_score,
)
from quantpage.ops.attend.decode.gluon_records import (
    OfChannels,
    Part,
    Results,
    Rows,
    Share,
    fixed_of,
)
from quantpage.ops.attend.decode.gluon_rows import (
    behind,
    capped,
    find_piece,
    row_sums,
    seen_pairs,
)
from quantpage.ops.attend.decode.gluon_share import (
    CUT_COST,
    copy_codes,
    first_pages,
    keys_of_all,
    my_share,
    page_of,
    planes,
    same,
    shown_keys,
    tile_at,
)
from quantpage.ops.triton import words as triton_words
from quantpage.ops.triton.common import A_TOKEN, FP8, INT4, LOG2E, STATIC, Constant
from quantpage.ops.triton.gluon_compat import (
    async_copy,
    fence_async_shared,
    mma_v2,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

log2_fast = gluon.jit(triton_words.log2_fast.fn)

SHIFT = Constant(6.0)
"""log2 of the largest p * v_scale of a row when its anchor was set."""
SLACK = Constant(9.0)
"""How far above that scores may go before the anchor follows: float16 holds 2^15."""
FLOOR = Constant(-1e30)
"""The anchor of a row that saw no key: a score of a key is far above it, -inf below."""

FAR = Constant(((127 + 3) << 23) + 0x700000)
"""The bits of SHIFT + SLACK, 15."""


@gluon.jit(
    do_not_specialize=["requests", "kv_heads", "min_tiles", "window", "sink_tokens", "table_row"]
)
def decode_kernel(
    q,
    k_codes,
    v_codes,
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
    """Arguments as in triton_kernel.decode_kernel; HEAD_DIM and VALUE_DIM 128 or 256."""
    FIXED: gl.constexpr = fixed_of(
        K_CODE, V_CODE, K_SCALES, V_SCALES, K_ZERO, V_ZERO, K_SHARED, V_SHARED, HEAD_DIM, VALUE_DIM,
        GROUP, PAGE, ROWS, ROW_TILES, TILE, FULL, WINDOW, SEGMENT, SOFTCAP, SINKS, STAGES, PIECES,
    )  # fmt: skip
    channels = OfChannels(k_scale, v_scale, k_zero, v_zero, k_scale_head, v_scale_head)
    results = Results(out, lse, part_out, part_lse, cuts, sinks, out_token, out_head)
    # Integer codes are multiplied as bytes, others as units (gluon_operands).
    BYTES: gl.constexpr = K_CODE != FP8
    BLOCK: gl.constexpr = 64 if K_CODE == INT4 else 128
    K_UNITS: gl.constexpr = HEAD_DIM // (4 if K_CODE == FP8 else 128 // BLOCK)
    V_UNITS: gl.constexpr = VALUE_DIM // 4
    K_UNIT: gl.constexpr = k_codes.dtype.element_ty
    V_UNIT: gl.constexpr = v_codes.dtype.element_ty
    k_copy: gl.constexpr = copy_layout(K_UNITS, K_UNIT)
    v_copy: gl.constexpr = copy_layout(V_UNITS, V_UNIT)
    k_load: gl.constexpr = byte_layout(TILE, BLOCK, K_UNITS) if BYTES else key_layout(TILE, K_UNITS)
    v_load: gl.constexpr = value_layout(TILE, V_UNITS)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    byte_score: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * ROWS, 32])
    k_operand: gl.constexpr = (
        gl.DotOperandLayout(0, byte_score, 4) if BYTES else gl.DotOperandLayout(0, s_layout, 2)
    )
    s_keys: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_rows: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    o_rows: gl.constexpr = gl.SliceLayout(0, o_layout)
    v_operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    p_operand: gl.constexpr = gl.DotOperandLayout(1, o_layout, 2)
    q_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )
    Q_NUMBER: gl.constexpr = gl.int8 if BYTES else gl.float16
    Q_ROWS: gl.constexpr = 2 * ROWS if BYTES else ROWS
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([Q_ROWS, HEAD_DIM], Q_NUMBER)
    p_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, ROWS], gl.float16)

    k_smem = gl.allocate_shared_memory(
        K_UNIT, [STAGES, TILE, K_UNITS], shared_layout(K_UNITS, K_UNIT)
    )
    v_smem = gl.allocate_shared_memory(
        V_UNIT, [STAGES, TILE, V_UNITS], shared_layout(V_UNITS, V_UNIT)
    )
    q_smem = gl.allocate_shared_memory(Q_NUMBER, [Q_ROWS, HEAD_DIM], q_shared)
    p_smem = gl.allocate_shared_memory(gl.float16, [TILE, ROWS], p_shared)
    far_smem = gl.allocate_shared_memory(gl.int32, [4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    far_layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])

    # One request's rows are alike: none has to begin more of them than others.
    LEAD: gl.constexpr = 0 if CHUNK == 1 else CUT_COST
    program = gl.program_id(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start, end, share, request, begins, even = my_share(
        query_starts, context_lens, requests, kv_heads * ROW_TILES, min_tiles, window,
        sink_tokens, PAGE, TILE, FULL, WINDOW, SEGMENT, CHUNK, LEAD,
    )  # fmt: skip
    lead = gl.where(even, 0, LEAD)
    start, end, share = same(start), same(end), same(share)
    request, begins, lead = same(request), same(begins), same(lead)
    line = Share(start, end, share, request, begins, even)
    position = start
    while position < end:
        piece = find_piece(
            query_starts, context_lens, request, begins, position, end, window, sink_tokens, PAGE,
            TILE, FULL, WINDOW, SEGMENT, lead,
        )  # fmt: skip
        (
            context, q_start, q_len, a_low, a_high, b_low, b_high, a_first, a_tiles, b_first, tiles,
        ) = piece.seen  # fmt: skip
        item, first_tile, last_tile = piece.item, piece.first_tile, piece.last_tile
        if last_tile > first_tile:
            head = (item // ROW_TILES).to(gl.int64)
            row_first = (item % ROW_TILES) * ROWS
            table = page_table + request.to(gl.int64) * table_row
            last_key = context - 1
            k_from = k_codes + head * k_head
            v_from = v_codes + head * v_head

            q_row = row_first + gl.arange(0, ROWS, gl.SliceLayout(1, q_layout))
            channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, q_layout))
            q_at = (q_start + q_row // GROUP).to(gl.int64) * q_token
            q_at += (head * GROUP + q_row % GROUP) * q_head
            q_real = (q_row < q_len * GROUP)[:, None]
            # Used when the first codes are on their way.
            asked = gl.load(q + q_at[:, None] + channel[None, :], mask=q_real, other=0.0)

            # All asked for before one of them is waited for.
            pages = first_pages(
                table, first_tile, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW,
                SEGMENT, STAGES,
            )  # fmt: skip
            key_start = tile_at(first_tile, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
            ks_from = k_scale + head * k_scale_head
            kz_from = k_zero + head * k_scale_head
            vs_from = v_scale + head * v_scale_head
            vz_from = v_zero + head * v_scale_head
            none = gl.full([TILE], 0, gl.float16, s_keys)
            next_ks, next_kz, next_vs, next_vz = planes(
                ks_from, kz_from, vs_from, vz_from, k_scale_page, v_scale_page, pages[0], table,
                key_start, last_key, none, K_SCALES, V_SCALES, K_ZERO, V_ZERO, PAGE, TILE, s_keys,
            )  # fmt: skip
            for i in gl.static_range(STAGES):
                t = first_tile + i
                if t < last_tile:
                    its_start = tile_at(t, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
                    copy_codes(
                        k_smem.index(i), k_from, k_page, pages[i], table, its_start, last_key, PAGE,
                        TILE, K_UNITS, k_copy,
                    )  # fmt: skip
                    copy_codes(
                        v_smem.index(i), v_from, v_page, pages[i], table, its_start, last_key, PAGE,
                        TILE, V_UNITS, v_copy,
                    )  # fmt: skip
                async_copy.commit_group()
            next_page = page_of(
                table, first_tile + 1, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW,
                SEGMENT,
            )  # fmt: skip
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
            unit, q_unit, q_fixed = store_queries(
                q_smem, asked, ROWS, HEAD_DIM, K_CODE, K_UNITS, s_rows
            )
            natural: gl.constexpr = 1.0 if SOFTCAP else LOG2E
            score_scale = softmax_scale * natural / unit
            q_sum = gl.convert_layout(gl.sum(terms, 1), s_rows) * (softmax_scale * natural)
            if K_CODE == INT4:
                # 8, by which codes are too large as they are multiplied, is part of their zero.
                fixed_sum = q_fixed.to(gl.float32) * q_unit * (softmax_scale * natural)
                if K_SCALES == A_TOKEN:
                    q_sum = fixed_sum
                elif K_ZERO:
                    q_sum -= 8.0 * fixed_sum
                else:
                    q_sum = -8.0 * fixed_sum
            fence_async_shared()

            first_seat = context - q_len
            all_low, all_high = keys_of_all(
                context, first_seat, window, PAGE, FULL, WINDOW, SEGMENT
            )
            anchor = gl.full([ROWS], FLOOR, gl.float32, s_rows)
            weights = halved(gl.full([TILE, ROWS], 0.0, gl.float32, s_layout), ROWS)
            offsets = weights
            if BYTES:
                no_score = gl.full([TILE, 2 * ROWS], 0, gl.int32, byte_score)
            else:
                no_score = gl.full([TILE, ROWS], 0.0, gl.float32, s_layout)
            acc = gl.full([VALUE_DIM, ROWS], 0.0, gl.float32, o_layout)

            stage = 0
            for t in range(first_tile, last_tile):
                async_copy.wait_group(STAGES - 1)
                # Everybody's copies of this tile are in.
                thread_barrier()
                k = k_smem.index(stage).load(k_load)
                if BYTES:
                    k = byte_operand(k, K_CODE, TILE, K_UNITS, k_operand)
                else:
                    k0, k1, k2, k3 = unpack(k, K_CODE)
                    k = key_operand(k0, k1, k2, k3, TILE, K_UNITS, k_operand)
                words = v_smem.index(stage).load(v_load)
                # Triton 3.6 waits for no asynchronous product of bytes from registers.
                s = warpgroup_mma(
                    k, q_smem.permute((1, 0)), no_score, use_acc=False, is_async=not BYTES
                )
                ks, kz, vs, vz = next_ks, next_kz, next_vs, next_vz
                following = gl.minimum(t + 1, last_tile - 1)
                next_start = tile_at(following, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
                next_ks, next_kz, next_vs, next_vz = planes(
                    ks_from, kz_from, vs_from, vz_from, k_scale_page, v_scale_page, next_page,
                    table, next_start, last_key, none, K_SCALES, V_SCALES, K_ZERO, V_ZERO, PAGE,
                    TILE, s_keys,
                )  # fmt: skip
                next_page = page_of(
                    table, t + 2, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW, SEGMENT
                )

                if not BYTES:
                    s, k = warpgroup_mma_wait(0, deps=(s, k))
                else:
                    s = whole_score(s, TILE, ROWS, s_layout)
                    s = s.to(gl.float32) * q_unit[None, :]
                if V_SCALES == A_TOKEN:
                    log_vs = log2_fast(gl.maximum(vs.to(gl.float32), 1e-30))
                # What is added is summed first: then it is one operation with the product.
                if K_SCALES == A_TOKEN:
                    scale = ks.to(gl.float32)
                    heavy = s * (scale * score_scale)[:, None]
                    if K_ZERO or K_CODE == INT4:
                        zero = scale * -8.0
                        if K_CODE != INT4:
                            zero = kz.to(gl.float32)
                        elif K_ZERO:
                            zero += kz.to(gl.float32)
                        more = q_sum[None, :] * zero[:, None]
                        if V_SCALES == A_TOKEN and not SOFTCAP:
                            more += log_vs[:, None]
                        heavy += more
                    elif V_SCALES == A_TOKEN and not SOFTCAP:
                        heavy += log_vs[:, None]
                else:
                    heavy = s * score_scale
                    if K_ZERO or K_CODE == INT4:
                        heavy += q_sum[None, :]
                    if V_SCALES == A_TOKEN and not SOFTCAP:
                        heavy += log_vs[:, None]
                if SOFTCAP:
                    heavy = capped(heavy, softcap)
                    if V_SCALES == A_TOKEN:
                        heavy += log_vs[:, None]
                if (key_start < all_low) | (key_start + TILE > all_high):
                    key = key_start + gl.arange(0, TILE, s_keys)
                    shown = shown_keys(
                        key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens,
                        WINDOW, SEGMENT,
                    )  # fmt: skip
                    seen = seen_pairs(
                        key, shown, row_first, s_rows, first_seat, q_len, window, sink_tokens, PAGE,
                        ROWS, GROUP, FULL, WINDOW, SEGMENT,
                    )  # fmt: skip
                    heavy = gl.where(seen, heavy, float("-inf"))
                    if V_SCALES == A_TOKEN:
                        # Where a key is hidden p is 0: what it is multiplied by has to be finite.
                        log_vs = gl.where(shown & (log_vs < float("inf")), log_vs, 0.0)
                        if V_ZERO:
                            vz = gl.where(shown & (gl.abs(vz) < float("inf")), vz, 0.0)
                x = heavy - anchor[None, :]
                p = gl.exp2(x)
                p_smem.store(p.to(gl.float16))
                # Positive floats are ordered as integers, and negative ones are below them.
                bits = gl.reshape(x.to(gl.int32, bitcast=True), [4, 16 * ROWS])
                far_smem.store(gl.max(bits, 1))
                # P is there, and everybody has this tile's codes in registers.
                thread_barrier()
                ahead = t + STAGES
                if ahead < last_tile:
                    ahead_tile = tile_at(ahead, a_first, a_tiles, b_first, WINDOW, SEGMENT)
                    copy_codes(
                        k_smem.index(stage), k_from, k_page, ahead_page, table, ahead_tile * TILE,
                        last_key, PAGE, TILE, K_UNITS, k_copy,
                    )  # fmt: skip
                    copy_codes(
                        v_smem.index(stage), v_from, v_page, ahead_page, table, ahead_tile * TILE,
                        last_key, PAGE, TILE, V_UNITS, v_copy,
                    )  # fmt: skip
                    ahead_page = page_of(
                        table, ahead + 1, last_tile, a_first, a_tiles, b_first, PAGE, TILE, WINDOW,
                        SEGMENT,
                    )  # fmt: skip
                async_copy.commit_group()
                if gl.max(far_smem.load(far_layout), 0) > FAR:
                    old = anchor
                    anchor = gl.maximum(anchor, gl.max(heavy, 0) - SHIFT)
                    shrink = gl.exp2(old - anchor)
                    less = gl.convert_layout(
                        shrink, gl.SliceLayout(0, gl.SliceLayout(1, weights.type.layout))
                    )[None, None, :]
                    weights = weights * less
                    if V_ZERO and V_SCALES == A_TOKEN:
                        offsets = offsets * less
                    acc = acc * gl.convert_layout(shrink, o_rows)[None, :]
                    p = gl.exp2(heavy - anchor[None, :])
                    p_smem.store(p.to(gl.float16))
                    thread_barrier()
                if V_SCALES == A_TOKEN:
                    # p is of p * v_scale; the row's weight is of p.
                    light = gl.exp2(-log_vs)
                    weights += halved(p * light[:, None], ROWS)
                    if V_ZERO:
                        offsets += halved(p * (light * vz.to(gl.float32))[:, None], ROWS)
                else:
                    weights += halved(p, ROWS)
                if V_CODE == FP8:
                    # Slots that no query sees may hold NaN.
                    v_key = key_start + gl.arange(0, TILE, gl.SliceLayout(1, v_load))
                    v_shown = shown_keys(
                        v_key, a_low, a_high, b_low, b_high, first_seat, window, sink_tokens,
                        WINDOW, SEGMENT,
                    )  # fmt: skip
                    words = gl.where(v_shown[:, None], words, 0)
                v0, v1, v2, v3 = unpack(words, V_CODE)
                v = value_operand(v0, v1, v2, v3, TILE, V_UNITS, v_operand)
                acc = mma_v2(v, p_smem.load(p_operand), acc)
                key_start = next_start
                stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            async_copy.wait_group(0)
            of = Rows(row_first, q_start, q_len, head, request, item)
            part = Part(first_tile, last_tile, tiles, position, piece.row_start, lead)
            ended = end_sums(
                weights, anchor, s_rows, row_sums, of, part, line, kv_heads, program, results, FIXED
            )
            ratio = ended.ratio
            o = acc * gl.convert_layout(ratio, o_rows)[None, :]
            if V_ZERO and V_SCALES == A_TOKEN:
                o += gl.convert_layout(
                    gl.convert_layout(gl.sum(gl.sum(offsets, 0), 0), s_rows) * ratio, o_rows
                )[None, :]
            mass = gl.convert_layout(ended.total * ratio, o_rows)
            o = in_order(o, V_UNITS, ROWS)
            end_outputs(o, mass, ended, of, channels, results, FIXED)
        position, request, begins = behind(piece, request, begins, kv_heads * ROW_TILES, lead)
