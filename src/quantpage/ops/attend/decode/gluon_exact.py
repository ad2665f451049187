"""Exact pages of drafts on Hopper: 16-bit keys and values as TMA copies them, rows by keys.

    S [rows, keys]     = q [rows, channels] K [channels, keys]      wgmma, both from shared memory
    O [rows, channels] = p [rows, keys] V [keys, channels]          wgmma, p from registers

A program takes whole rows of 64 queries, of which each page is read once, where the Triton kernel's
16 rows a program read it four times. A row has three or four pages of 64 keys: all are asked for at
once. They run when programs of the body end, and the shape is such that one fits in the place of
each. The mask, key ranges and names are those of gluon_drafts.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_drafts_operands import Shown, in_ring, ring_layout, seen_keys
from quantpage.ops.attend.decode.gluon_rows import capped, seen_of, seen_rows
from quantpage.ops.attend.decode.gluon_share import first_pages, page_of, same, tile_at
from quantpage.ops.attend.flash.gluon_parts import stage_of
from quantpage.ops.attend.flash.triton_segments import NEAR
from quantpage.ops.triton.common import LN2, LOG2E
from quantpage.ops.triton.gluon_compat import (
    fence_async_shared,
    mbarrier,
    thread_barrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _ask(keys, values, landed, k_boxes, v_boxes, stage, page, head, slot):
    """Ask for a tile's keys and values, from ``slot`` on of a page; of a page that is not kept, -1,
    zeros come.
    """
    bar = landed.index(stage)
    mbarrier.expect(bar, keys.block_type.nbytes + values.block_type.nbytes)
    tma_load(keys, [page, head, slot, 0], bar, k_boxes.index(stage))
    tma_load(values, [page, head, slot, 0], bar, v_boxes.index(stage))


@gluon.jit(
    do_not_specialize=["requests", "kv_heads", "min_tiles", "window", "sink_tokens", "table_row"]
)
def exact_kernel(
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
    BESIDE: gl.constexpr,
):
    """Arguments as in triton_kernel.decode_kernel, but pages as TMA descriptors; of whole rows
    there are no pieces. ROWS and TILE 64, HEAD_DIM and VALUE_DIM 128, PAGE a multiple of 64.
    """
    gl.static_assert(ROWS == 64 and TILE == 64 and PAGE % TILE == 0)
    gl.static_assert(not SINKS and not PIECES)
    K_NUMBER: gl.constexpr = k_pages.dtype
    V_NUMBER: gl.constexpr = v_pages.dtype
    # Probabilities of float16 are kept out of its subnormals.
    SHIFT: gl.constexpr = 0.0 if gl.bfloat16 == V_NUMBER else 12.0
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    p_operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_keys: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )
    v_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // VALUE_DIM, VALUE_DIM // 8], [4, 1], [1, 0]
    )
    v_keys: gl.constexpr = gl.SliceLayout(1, v_layout)
    k_boxes = gl.allocate_shared_memory(K_NUMBER, [STAGES, 1, 1, TILE, HEAD_DIM], k_pages.layout)
    v_boxes = gl.allocate_shared_memory(V_NUMBER, [STAGES, 1, 1, TILE, VALUE_DIM], v_pages.layout)
    q_smem = gl.allocate_shared_memory(
        K_NUMBER, [ROWS, HEAD_DIM], ring_layout(ROWS, HEAD_DIM, K_NUMBER)
    )
    k_ring = in_ring(k_boxes)
    v_ring = in_ring(v_boxes)
    landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(landed.index(i), count=1)
    fence_async_shared()
    thread_barrier()
    if OVERLAP:
        if not BESIDE:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    natural: gl.constexpr = 1.0 if SOFTCAP else LOG2E
    score_scale = softmax_scale * natural
    rows_a_request = kv_heads * ROW_TILES
    # Tiles of this program before: where the next one lies in the ring.
    count = 0
    for position in range(gl.program_id(0), requests * rows_a_request, gl.num_programs(0)):
        request = same(position // rows_a_request)
        item = position - request * rows_a_request
        seen = seen_of(
            query_starts, context_lens, request, window, sink_tokens, PAGE, TILE, FULL, WINDOW,
            SEGMENT,
        )  # fmt: skip
        (
            context, q_start, q_len, a_low, a_high, b_low, b_high, a_first, a_tiles, b_first, tiles,
        ) = seen  # fmt: skip
        kv_head = item // ROW_TILES
        row_first = (item % ROW_TILES) * ROWS
        table = page_table + request.to(gl.int64) * table_row
        if tiles > 0:
            pages = first_pages(
                table, 0, tiles, a_first, a_tiles, b_first, PAGE, TILE, WINDOW, SEGMENT, STAGES
            )
            for i in gl.static_range(STAGES):
                if i < tiles:
                    stage, _ = stage_of(count + i, STAGES)
                    slot = tile_at(i, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE % PAGE
                    _ask(k_pages, v_pages, landed, k_boxes, v_boxes, stage, pages[i], kv_head, slot)

        head = kv_head.to(gl.int64)
        q_row = row_first + gl.arange(0, ROWS, gl.SliceLayout(1, q_layout))
        channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, q_layout))
        q_at = (q_start + q_row // GROUP).to(gl.int64) * q_token
        q_at += (head * GROUP + q_row % GROUP) * q_head
        q_real = (q_row < q_len * GROUP)[:, None]
        asked = gl.load(q + q_at[:, None] + channel[None, :], mask=q_real, other=0.0)
        # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
        asked = gl.where(gl.abs(asked.to(gl.float32)) < float("inf"), asked, float("nan"))
        q_smem.store(asked.to(K_NUMBER))
        fence_async_shared()
        thread_barrier()

        first_seat = context - q_len
        shown = Shown(a_low, a_high, b_low, b_high, first_seat, window, sink_tokens)
        top = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
        weights = gl.full([ROWS], 0.0, gl.float32, s_rows)
        no_score = gl.full([ROWS, TILE], 0.0, gl.float32, s_layout)
        acc = gl.full([ROWS, VALUE_DIM], 0.0, gl.float32, o_layout)
        for t in range(0, tiles):
            stage, phase = stage_of(count, STAGES)
            key_start = tile_at(t, a_first, a_tiles, b_first, WINDOW, SEGMENT) * TILE
            ahead = page_of(
                table, t + STAGES, tiles, a_first, a_tiles, b_first, PAGE, TILE, WINDOW, SEGMENT
            )
            mbarrier.wait(landed.index(stage), phase)
            k = k_ring.index(stage).permute((1, 0))
            score = warpgroup_mma(q_smem, k, no_score, use_acc=False, is_async=True)
            score = warpgroup_mma_wait(0, deps=(score,))
            score = score * score_scale
            if SOFTCAP:
                score = capped(score, softcap)
            last_key = key_start + TILE - 1
            of_all = (last_key < PAGE) | ((context - 1) // PAGE - key_start // PAGE <= NEAR)
            of_all = of_all & (last_key <= first_seat)
            if FULL or WINDOW:
                of_all = q_len < 0
            if not of_all:
                key = key_start + gl.arange(0, TILE, s_keys)
                visible = seen_rows(
                    key, shown, row_first, s_rows, q_len, PAGE, ROWS, GROUP, FULL, WINDOW, SEGMENT
                )
                score = gl.where(visible, score, float("-inf"))
            new_top = gl.maximum(top, gl.max(score, 1))
            anchor = gl.where(new_top == float("-inf"), 0.0, new_top - SHIFT)
            shrink = gl.exp2(top - SHIFT - anchor)
            p = gl.exp2(score - anchor[:, None])
            weights = weights * shrink + gl.sum(p, 1)
            top = new_top
            acc = acc * gl.convert_layout(shrink, o_rows)[:, None]
            if not of_all:
                # A value that is not finite reaches the queries that see it, through their own
                # weight of it: the product would take it to all, as 0 times NaN is NaN.
                values = v_ring.index(stage)
                v = values.load(v_layout)
                wrong = gl.abs(v.to(gl.float32)) < float("inf")
                bad = gl.max(wrong.to(gl.int32) ^ 1, 1)
                v_key = key_start + gl.arange(0, TILE, v_keys)
                kept = seen_keys(v_key, shown, WINDOW, SEGMENT) & (bad == 0)
                values.store(gl.where(kept[:, None], v, 0.0).to(V_NUMBER))
                bad = gl.convert_layout(bad, s_keys)
                p = gl.where((bad > 0)[None, :] & (p != 0.0), float("nan"), p)
                fence_async_shared()
                thread_barrier()
            p16 = gl.convert_layout(p.to(V_NUMBER), p_operand)
            acc = warpgroup_mma(p16, v_ring.index(stage), acc, is_async=True)
            acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
            count += 1
            if t + STAGES < tiles:
                # Everybody has read what the next copy writes over.
                thread_barrier()
                tile = tile_at(t + STAGES, a_first, a_tiles, b_first, WINDOW, SEGMENT)
                slot = tile * TILE % PAGE
                _ask(k_pages, v_pages, landed, k_boxes, v_boxes, stage, ahead, kv_head, slot)

        # A request whose mask shows no key, of which no token counts, has its rows of nothing.
        new = gl.load(query_starts + request + 1) - q_start
        rows = gl.where(tiles > 0, q_len, new) * GROUP
        some = weights != 0.0
        row_lse = gl.where(some, top - SHIFT + gl.log2(gl.where(some, weights, 1.0)), float("-inf"))
        ratio = gl.where(some, 1.0 / gl.where(some, weights, 1.0), 0.0)
        row = row_first + gl.arange(0, ROWS, s_rows)
        token_at = (q_start + row // GROUP).to(gl.int64)
        if lse is not None:
            at = lse + token_at * (kv_heads * GROUP) + head * GROUP + row % GROUP
            gl.store(at, row_lse * LN2, mask=row < rows)
        out_row = row_first + gl.arange(0, ROWS, o_rows)
        out_channel = gl.arange(0, VALUE_DIM, gl.SliceLayout(0, o_layout))
        out_at = (q_start + out_row // GROUP).to(gl.int64) * out_token
        out_at += (head * GROUP + out_row % GROUP) * out_head
        o = acc * gl.convert_layout(ratio, o_rows)[:, None]
        gl.store(
            out + out_at[:, None] + out_channel[None, :], o.to(out.dtype.element_ty),
            mask=(out_row < rows)[:, None],
        )  # fmt: skip
        # Queries of the next row come to the same place.
        thread_barrier()
    if BESIDE:  # noqa: SIM102
        # Whoever waits for this launch waits for the one beside it, too: that one program ends
        # behind it is enough, and the others leave their places to those that have not begun.
        if gl.program_id(0) == gl.num_programs(0) - 1:
            tl.extra.cuda.gdc_wait()
