"""The walk of up to 32 query rows over their keys: what memory bounds.

The second product is mma, which reads p without a proxy fence: a fence waits for the copies under
way, of which there always are some here. A stage is filled again once its tile is read, behind a
barrier of its own: behind the next tile's, one barrier less, three stages took as long or up to 4 %
longer, and two would leave one copy under way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_kernel import FAR, FLOOR, SHIFT, log2_fast
from quantpage.ops.attend.decode.gluon_operands import halved, shared_layout
from quantpage.ops.attend.decode.gluon_rows import capped, seen_pairs
from quantpage.ops.attend.decode.gluon_share import keys_of_all, shown_keys
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.attend.latent.gluon_operands import (
    PART,
    far_bits,
    hide_codes,
    key_part,
    scales_into_l2,
    score_of,
    value_part,
)
from quantpage.ops.attend.latent.gluon_records import copy_tile, first_key, page_at, scales_at
from quantpage.ops.triton.common import FP8
from quantpage.ops.triton.gluon_compat import (
    async_copy,
    mma_v2,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _unit_scores(row_tile, rotary_tile, q_smem, turned_smem, no_score, k_operand: gl.constexpr):
    """Scores of a tile's rows and of its rotary channels, unscaled. A part of the codes becomes
    float16 in registers while the part before is multiplied.
    """
    WARPS: gl.constexpr = gl.num_warps()
    gl.static_assert(q_smem.shape[1] == 4 * PART)
    before = key_part(rotary_tile, FP8, WARPS, k_operand)
    other = warpgroup_mma(
        before, turned_smem.permute((1, 0)), no_score, use_acc=False, is_async=True
    )
    k = _unit_part(row_tile, 0, WARPS, k_operand)
    even = warpgroup_mma(k, _query_part_of(q_smem, 0), no_score, use_acc=False, is_async=True)
    other, before = warpgroup_mma_wait(1, deps=(other, before))
    before = _unit_part(row_tile, 1, WARPS, k_operand)
    odd = warpgroup_mma(before, _query_part_of(q_smem, 1), no_score, use_acc=False, is_async=True)
    even, k = warpgroup_mma_wait(1, deps=(even, k))
    k = _unit_part(row_tile, 2, WARPS, k_operand)
    even = warpgroup_mma(k, _query_part_of(q_smem, 2), even, is_async=True)
    odd, before = warpgroup_mma_wait(1, deps=(odd, before))
    before = _unit_part(row_tile, 3, WARPS, k_operand)
    odd = warpgroup_mma(before, _query_part_of(q_smem, 3), odd, is_async=True)
    even, odd, k, before = warpgroup_mma_wait(0, deps=(even, odd, k, before))
    return even + odd, other


@gluon.jit
def _unit_part(tile, NTH: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    return key_part(tile.slice(NTH * (PART // 4), PART // 4, dim=1), FP8, WARPS, layout)


@gluon.jit
def _query_part_of(q_smem, NTH: gl.constexpr):
    return q_smem.slice(NTH * PART, PART, dim=1).permute((1, 0))


@gluon.jit
def walk_few(
    rings, q_smem, turned_smem, p_smem, far_smem, pages, table, seen, next_page, ahead_page,
    next_scale, next_other, factor, softcap, FIXED: gl.constexpr,
):  # fmt: skip
    """Outputs (two or four parts of the channels), weights and anchors of a row's tiles.

    Queries are in shared memory, and the ring's tiles asked for. next_page: the second tile's.
    ahead_page: of the first that the ring has no room for. next_scale, next_other: the first
    tile's, as they lie.
    """
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = WARPS // 4
    CODE: gl.constexpr = FIXED.CODE
    PAGE: gl.constexpr = FIXED.PAGE
    ROWS: gl.constexpr = FIXED.ROWS
    TILE: gl.constexpr = FIXED.TILE
    WINDOW: gl.constexpr = FIXED.WINDOW
    STAGES: gl.constexpr = rings.rows.shape[0]
    ROW_DIM: gl.constexpr = FIXED.ROW_DIM
    ROTARY_DIM: gl.constexpr = 4 * rings.rotary.shape[2]
    V_WORDS: gl.constexpr = 8 * WARPS
    V_PARTS: gl.constexpr = ROW_DIM // 4 // V_WORDS
    # Integer keys are multiplied as bytes, those of fp8 from words.
    BYTES: gl.constexpr = CODE != FP8
    KEY: gl.constexpr = gl.int8 if BYTES else gl.int32
    EACH: gl.constexpr = 1 if BYTES else 4
    product: gl.constexpr = FIXED.product
    s_layout: gl.constexpr = FIXED.scores
    o_layout: gl.constexpr = FIXED.outputs
    s_keys: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_rows: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(0, o_layout)
    k_operand: gl.constexpr = gl.DotOperandLayout(0, product, 4 if BYTES else 2)
    v_operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    p_operand: gl.constexpr = gl.DotOperandLayout(1, o_layout, 2)
    far_layout: gl.constexpr = gl.BlockedLayout([WARPS], [32], [WARPS], [0])
    row_keys = rings.rows._reinterpret(
        KEY, [STAGES, TILE, ROW_DIM // EACH], shared_layout(ROW_DIM // EACH, KEY)
    )
    rotary_keys = rings.rotary._reinterpret(
        KEY, [STAGES, TILE, ROTARY_DIM // EACH], shared_layout(ROTARY_DIM // EACH, KEY)
    )

    key_start = first_key(seen, seen.first_tile, FIXED)
    first_seat = seen.context - seen.q_len
    all_low, all_high = keys_of_all(
        seen.context, first_seat, seen.window, PAGE, FIXED.FULL, WINDOW, ALL_KEYS
    )
    anchor = gl.full([ROWS], FLOOR, gl.float32, s_rows)
    weights = halved(gl.full([TILE, ROWS], 0.0, gl.float32, s_layout), ROWS)
    no_score = gl.full([TILE, q_smem.shape[0]], 0, gl.int32 if BYTES else gl.float32, product)
    acc0 = gl.full([4 * V_WORDS, ROWS], 0.0, gl.float32, o_layout)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0

    stage = 0
    for t in range(seen.first_tile, seen.last_tile):
        async_copy.wait_group(STAGES - 1)
        # Everybody's copies of this tile are in.
        thread_barrier()
        scale, other = next_scale.to(gl.float32), next_other.to(gl.float32)
        next_start = first_key(seen, gl.minimum(t + 1, seen.last_tile - 1), FIXED)
        next_scale, next_other = scales_at(pages, next_page, table, next_start, FIXED, s_keys)
        next_page = page_at(table, seen, t + 2, FIXED)

        if BYTES:
            # Triton 3.6 waits for no asynchronous product of bytes from registers.
            k = rotary_keys.index(stage).load(k_operand)
            s = warpgroup_mma(k, turned_smem.permute((1, 0)), no_score, use_acc=False)
            score = score_of(s, CODE, GROUPS, s_layout) * other[:, None]
            k = row_keys.index(stage).load(k_operand)
            s = warpgroup_mma(k, q_smem.permute((1, 0)), no_score, use_acc=False)
            s = score_of(s, CODE, GROUPS, s_layout)
        else:
            s, score = _unit_scores(
                row_keys.index(stage), rotary_keys.index(stage), q_smem, turned_smem, no_score,
                k_operand,
            )  # fmt: skip
            score = score * other[:, None]
        score += s * scale[:, None]
        score = score * factor[None, :]
        if FIXED.SOFTCAP:
            score = capped(score, softcap)
        log_scale = log2_fast(gl.maximum(scale, 1e-30))
        heavy = score + log_scale[:, None]
        if (key_start < all_low) | (key_start + TILE > all_high):
            key = key_start + gl.arange(0, TILE, s_keys)
            shown = shown_keys(
                key, seen.a_low, seen.a_high, seen.b_low, seen.b_high, first_seat, seen.window,
                seen.sink_tokens, WINDOW, ALL_KEYS,
            )  # fmt: skip
            pairs = seen_pairs(
                key, shown, seen.row_first, s_rows, first_seat, seen.q_len, seen.window,
                seen.sink_tokens, PAGE, ROWS, FIXED.HEADS, FIXED.FULL, WINDOW, ALL_KEYS,
            )  # fmt: skip
            heavy = gl.where(pairs, heavy, float("-inf"))
            # Where a key is hidden p is 0: what it is multiplied by has to be finite.
            log_scale = gl.where(shown & (log_scale < float("inf")), log_scale, 0.0)
            if CODE == FP8:
                hide_codes(rings.rows.index(stage), key_start, seen, WINDOW)
        x = heavy - anchor[None, :]
        p = gl.exp2(x)
        p_smem.store(p.to(gl.float16))
        far_smem.store(far_bits(x, GROUPS))
        # P is there, and nobody reads the tile before any more.
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
            thread_barrier()
        # p is of p * scale; the row's weight is of p.
        weights += halved(p * gl.exp2(-log_scale)[:, None], ROWS)
        mine = rings.rows.index(stage)
        heavy_p = p_smem.load(p_operand)
        v = value_part(mine, 0, TILE, 0, CODE, v_operand)
        acc0 = mma_v2(v, heavy_p, acc0)
        v = value_part(mine, 0, TILE, 1, CODE, v_operand)
        acc1 = mma_v2(v, heavy_p, acc1)
        if V_PARTS > 2:
            v = value_part(mine, 0, TILE, 2, CODE, v_operand)
            acc2 = mma_v2(v, heavy_p, acc2)
            v = value_part(mine, 0, TILE, 3, CODE, v_operand)
            acc3 = mma_v2(v, heavy_p, acc3)
        # Nobody reads this tile any more.
        thread_barrier()
        ahead = t + STAGES
        if ahead < seen.last_tile:
            ahead_start = first_key(seen, ahead, FIXED)
            copy_tile(rings, stage, pages, ahead_page, table, ahead_start, FIXED)
            scales_into_l2(pages, ahead_page, ahead_start, PAGE, TILE)
            ahead_page = page_at(table, seen, ahead + 1, FIXED)
        async_copy.commit_group()
        key_start = next_start
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    async_copy.wait_group(0)
    return acc0, acc1, acc2, acc3, weights, anchor
