"""The walk of 64 query rows over their keys: two warpgroups, both products on wgmma.

The tensor cores are what bounds it, so that they have to have work while threads have theirs: the
next tile's scores are asked for before this one's values are multiplied, and are there when its
softmax begins; while they are made threads unpack values.

    threads        softmax t | unpack t ..        | softmax t+1 | ..
    tensor cores             | S t+1    | O += t  |             | S t+2 ..

Integer keys are read by the product where the copies left them, so that it takes no registers of
theirs and is asynchronous. A tile has one fence and one barrier: they stand where no copy is under
way, as a fence waits for all. What it stores there lies twice, by turns, so that nobody waits for
who still reads the tile before.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_kernel import FAR, FLOOR, SHIFT, log2_fast
from quantpage.ops.attend.decode.gluon_operands import halved
from quantpage.ops.attend.decode.gluon_rows import capped, seen_pairs
from quantpage.ops.attend.decode.gluon_share import here, keys_of_all, shown_keys
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
    fence_async_shared,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _unit_scores(
    row_tile, rotary_tile, q_smem, turned_smem, scale, other, no_score, GROUPS: gl.constexpr,
    k_operand: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Scores of a tile whose codes become float16 in registers, waited for."""
    WARPS: gl.constexpr = gl.num_warps()
    k = key_part(rotary_tile, FP8, WARPS, k_operand)
    s = warpgroup_mma(k, turned_smem.permute((1, 0)), no_score, use_acc=False)
    score = score_of(s, FP8, GROUPS, layout) * other[:, None]
    s = no_score
    for i in gl.static_range(q_smem.shape[1] // PART):
        k = key_part(row_tile.slice(i * (PART // 4), PART // 4, dim=1), FP8, WARPS, k_operand)
        q = q_smem.slice(i * PART, PART, dim=1)
        s = warpgroup_mma(k, q.permute((1, 0)), s, use_acc=i > 0)
    return score + score_of(s, FP8, GROUPS, layout) * scale[:, None]


@gluon.jit
def walk_many(
    rings, q_smem, turned_smem, p_smem, far_smem, pages, table, seen, next_page, scale, other,
    factor_smem, softcap, FIXED: gl.constexpr,
):  # fmt: skip
    """Outputs (two parts of the channels), weights and anchors of a row's tiles.

    The first tile's codes and queries are in shared memory, fenced; the second tile's are asked
    for. next_page: the second tile's. scale, other: the first tile's, as they lie.
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
    BYTES: gl.constexpr = CODE != FP8
    PIECE: gl.constexpr = 16
    product: gl.constexpr = FIXED.product
    s_layout: gl.constexpr = FIXED.scores
    o_layout: gl.constexpr = FIXED.outputs
    s_keys: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_rows: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(0, o_layout)
    k_operand: gl.constexpr = gl.DotOperandLayout(0, product, 4 if BYTES else 2)
    v_operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    far_layout: gl.constexpr = gl.BlockedLayout([WARPS], [32], [WARPS], [0])
    row_bytes = rings.rows._reinterpret(
        gl.int8, [STAGES, TILE, ROW_DIM],
        gl.NVMMASharedLayout.get_default_for([TILE, ROW_DIM], gl.int8),
    )  # fmt: skip
    rotary_bytes = rings.rotary._reinterpret(
        gl.int8, [STAGES, TILE, ROTARY_DIM],
        gl.NVMMASharedLayout.get_default_for([TILE, ROTARY_DIM], gl.int8),
    )  # fmt: skip

    first_seat = seen.context - seen.q_len
    all_low, all_high = keys_of_all(
        seen.context, first_seat, seen.window, PAGE, FIXED.FULL, WINDOW, ALL_KEYS
    )
    anchor = gl.full([ROWS], FLOOR, gl.float32, s_rows)
    weights = halved(gl.full([TILE, ROWS], 0.0, gl.float32, s_layout), ROWS)
    no_score = gl.full([TILE, product_columns(ROWS, CODE)], 0, gl.int32 if BYTES else gl.float32,
                       product)  # fmt: skip
    acc0 = gl.full([ROW_DIM // 2, ROWS], 0.0, gl.float32, o_layout)
    acc1 = acc0

    key_start = first_key(seen, seen.first_tile, FIXED)
    next_start = first_key(seen, gl.minimum(seen.first_tile + 1, seen.last_tile - 1), FIXED)
    scale, other = scale.to(gl.float32), other.to(gl.float32)
    # Everybody's copies of the first tile and queries are in.
    thread_barrier()
    if BYTES:
        s = warpgroup_mma(
            row_bytes.index(0), q_smem.index(0).permute((1, 0)), no_score, use_acc=False
        )
        score = score_of(s, CODE, GROUPS, s_layout) * scale[:, None]
        s = warpgroup_mma(
            rotary_bytes.index(0), turned_smem.permute((1, 0)), no_score, use_acc=False
        )
    else:
        s = no_score
        score = gl.full([TILE, ROWS], 0.0, gl.float32, s_layout)
    next_scale, next_other = scales_at(pages, next_page, table, next_start, FIXED, s_keys)
    next_page = page_at(table, seen, seen.first_tile + 2, FIXED)

    stage = 0
    for t in range(seen.first_tile, seen.last_tile):
        if BYTES:
            score += score_of(s, CODE, GROUPS, s_layout) * other[:, None]
        else:
            score = _unit_scores(
                rings.rows.index(stage), rings.rotary.index(stage), q_smem.index(0), turned_smem,
                scale, other, no_score, GROUPS, k_operand, s_layout,
            )  # fmt: skip
        score = score * factor_smem.load(s_rows)[None, :]
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
        turn = t % 2
        p_smem.index(turn).store(p.to(gl.float16))
        far_smem.index(turn).store(far_bits(x, GROUPS))
        # The next tile's codes are in, and no other copy is under way.
        async_copy.wait_group(0)
        fence_async_shared()
        # P and the next tile are there, and nobody reads the tile before any more.
        thread_barrier()
        ahead = t + 2
        if ahead < seen.last_tile:
            ahead_start = first_key(seen, ahead, FIXED)
            before = gl.where(stage == 0, STAGES, stage) - 1
            copy_tile(rings, before, pages, next_page, table, ahead_start, FIXED)
            scales_into_l2(pages, next_page, ahead_start, PAGE, TILE)
        async_copy.commit_group()
        if gl.max(far_smem.index(turn).load(far_layout), 0) > FAR:
            old = anchor
            anchor = gl.maximum(anchor, gl.max(heavy, 0) - SHIFT)
            shrink = gl.exp2(old - anchor)
            summed: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, weights.type.layout))
            weights = weights * gl.convert_layout(shrink, summed)[None, None, :]
            lessened = gl.convert_layout(shrink, o_rows)
            acc0 = acc0 * lessened[None, :]
            acc1 = acc1 * lessened[None, :]
            p = gl.exp2(heavy - anchor[None, :])
            p_smem.index(turn).store(p.to(gl.float16))
            fence_async_shared()
            thread_barrier()
        # p is of p * scale; the row's weight is of p.
        weights += halved(p * gl.exp2(-log_scale)[:, None], ROWS)

        mine = rings.rows.index(stage)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        scale, other = next_scale.to(gl.float32), next_other.to(gl.float32)
        # Of the tile past the last what lies there is multiplied, and nobody reads it.
        if BYTES:
            # Unknown to the compiler, their place keeps no registers for addresses of its parts.
            s = warpgroup_mma(
                row_bytes.index(stage), q_smem.index(here(0)).permute((1, 0)), no_score,
                use_acc=False, is_async=True,
            )  # fmt: skip
        # A piece of the tile at a time: one is unpacked while the one before is multiplied.
        p_tile = p_smem.index(turn)
        v = value_part(mine, 0, PIECE, 0, CODE, v_operand)
        acc0 = warpgroup_mma(v, p_tile.slice(0, PIECE), acc0, is_async=True)
        w = value_part(mine, 0, PIECE, 1, CODE, v_operand)
        acc1 = warpgroup_mma(w, p_tile.slice(0, PIECE), acc1, is_async=True)
        key_start = next_start
        next_start = first_key(seen, gl.minimum(ahead, seen.last_tile - 1), FIXED)
        next_scale, next_other = scales_at(pages, next_page, table, next_start, FIXED, s_keys)
        next_page = page_at(table, seen, t + 3, FIXED)
        acc0, v, s = warpgroup_mma_wait(1, deps=(acc0, v, s))
        if BYTES:
            score = score_of(s, CODE, GROUPS, s_layout) * scale[:, None]
        for i in gl.static_range(1, TILE // PIECE):
            v = value_part(mine, i * PIECE, PIECE, 0, CODE, v_operand)
            acc0 = warpgroup_mma(v, p_tile.slice(i * PIECE, PIECE), acc0, is_async=True)
            acc1, w = warpgroup_mma_wait(1, deps=(acc1, w))
            w = value_part(mine, i * PIECE, PIECE, 1, CODE, v_operand)
            if BYTES and i == TILE // PIECE - 1:
                s = warpgroup_mma(
                    rotary_bytes.index(stage), turned_smem.permute((1, 0)), no_score, use_acc=False,
                    is_async=True,
                )  # fmt: skip
            acc1 = warpgroup_mma(w, p_tile.slice(i * PIECE, PIECE), acc1, is_async=True)
            if i < TILE // PIECE - 1:
                acc0, v = warpgroup_mma_wait(1, deps=(acc0, v))
        acc0, acc1, s, v, w = warpgroup_mma_wait(0, deps=(acc0, acc1, s, v, w))
    return acc0, acc1, weights, anchor


@gluon.constexpr_function
def product_columns(rows, code):
    """Of scores as they are multiplied: a query beside integer codes is two int8 numbers."""
    return rows if code == FP8 else 2 * rows
