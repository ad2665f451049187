"""Causal attention on Hopper: one TMA warp feeds two warpgroups of wgmma.

The kernel reads K and V as dense 16-bit rows (a workspace that gather fills), and queries where
they lie. A tile is BM rows of (token, query head of one kv_head) pairs: packing the group makes a
tile of a short chunk full, and lets any group size share the K and V that it reads.

Order inside a consumer, one key tile t at a time: the scores of t+1 are issued before the values
of t are multiplied, and the softmax of t+1 runs while they are (FlashAttention-3, arXiv 2407.08608
section 3.2). The two consumers drift apart by themselves, so that one's softmax hides behind the
other's matrix products. Tried on an H200 and left out, as no faster: turns between the consumers by
barriers, keys from the last to the first, and asking for the next tile's queries behind the last
product of this one (4 to 7 % slower).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.flash.gluon_parts import (
    capped,
    finish,
    given_scales,
    load_queries,
    online_softmax,
    start_barriers,
    start_rows,
)
from quantpage.ops.attend.triton_segments import near_page
from quantpage.ops.triton.common import LN2, LOG2E, Constant
from quantpage.ops.triton.gluon_compat import (
    fence_async_shared,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

WORK_FIELDS = Constant(9)
"""int32 a work item: prefill/plan.WORK_FIELDS names them."""


@gluon.jit
def _key_tiles(
    item, window, sink_tiles, page_size, G: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BODY: gl.constexpr,
):  # fmt: skip
    """Key tiles of one work item: how many, and the first one after the sink tiles."""
    new = gl.load(item + 1)
    position = gl.load(item + 2)
    row = gl.load(item + 3)
    base = gl.load(item + 5)
    end = gl.load(item + 6)
    first = position + row // G
    last = position + gl.minimum(row + BM - 1, new * G - 1) // G
    high = end
    if CAUSAL:
        body_high = gl.maximum(near_page(last, page_size), 0) * page_size
        high = gl.minimum(body_high if BODY else last + 1, end)
    low = 0
    if WINDOW:
        low = first - window + 1
    if BODY:
        low = gl.maximum(low, page_size)
    low_tile = gl.maximum(low - base, 0) // BN
    high_tile = (gl.maximum(high - base, 0) + BN - 1) // BN
    # At least one tile, so that every barrier is used; a row without keys masks all of it.
    count = gl.maximum(sink_tiles + gl.maximum(high_tile - low_tile, 0), 1)
    return count, low_tile


@gluon.jit
def _producer(
    k_desc, v_desc, order, work, k_smem, v_smem, k_full, k_empty, v_full, v_empty, rounds, heads,
    head_rows, window, sink_tiles, page_size, G: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BODY: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    grid = gl.num_programs(0)
    count = 0
    for turn in range(rounds):
        tile = gl.load(order + turn * grid + pid)
        if tile >= 0:
            head = tile % heads
            item = work + tile // heads * WORK_FIELDS
            tiles, low_tile = _key_tiles(
                item, window, sink_tiles, page_size, G, BM, BN, CAUSAL, WINDOW, BODY
            )
            row = head * head_rows + gl.load(item + 4)
            for j in range(tiles):
                at = row + gl.where(j < sink_tiles, j, j + low_tile) * BN
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, [at, 0], k_full.index(stage), k_smem.index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, [at, 0], v_full.index(stage), v_smem.index(stage))
                count += 1


@gluon.jit
def _masked(
    s, key0, limit, low, end, sink_tokens, page_size, s_layout: gl.constexpr, BN: gl.constexpr,
    WINDOW: gl.constexpr, BODY: gl.constexpr,
):  # fmt: skip
    """Scores of invisible pairs become -inf."""
    keys = (key0 + gl.arange(0, BN, gl.SliceLayout(0, s_layout)))[None, :]
    seen = keys < limit[:, None]
    if WINDOW:
        seen = seen & ((keys >= low[:, None]) | (keys < sink_tokens))
    if BODY:
        seen = seen & (keys >= page_size)
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _softmax(
    s, m, mass, scale, cap, key0, masked, limit, low, end, sink_tokens, page_size,
    s_layout: gl.constexpr, p_layout: gl.constexpr, dtype: gl.constexpr, BN: gl.constexpr,
    WINDOW: gl.constexpr, BODY: gl.constexpr, SOFTCAP: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    """One tile of scores into the running maximum and sum."""
    if SOFTCAP:
        s = capped(s, scale, cap)
        scale = 1.0
    if masked:
        s = _masked(s, key0, limit, low, end, sink_tokens, page_size, s_layout, BN, WINDOW, BODY)
    return online_softmax(s, m, mass, scale, p_layout, dtype, SHIFT)


@gluon.jit
def _consumer(
    q_ptr, out_ptr, lse_ptr, carry_ptr, carry_lse_ptr, sinks_ptr, v_scale, v_zero, vs_head, order,
    work, q_smem, k_smem,
    v_smem, k_full, k_empty, v_full, v_empty, rounds, heads, head0, part_rows, q_heads, q_token,
    q_head, scale, cap, window, sink_tokens, sink_tiles, page_size, G: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DP: gl.constexpr,
    DVP: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, BODY: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
    CARRY: gl.constexpr, SHIFT: gl.constexpr, V_STATIC: gl.constexpr, V_ZERO: gl.constexpr,
    V_GROUPS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_smem.dtype
    ROWS: gl.constexpr = BM // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DVP, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    grid = gl.num_programs(0)
    pid = gl.program_id(0)
    q_half = q_smem.slice(HALF * ROWS, ROWS)
    zero = gl.zeros([ROWS, BN], gl.float32, s_layout)
    count = 0
    for turn in range(rounds):
        tile = gl.load(order + turn * grid + pid)
        if tile >= 0:
            head = tile % heads
            item = work + tile // heads * WORK_FIELDS
            tiles, low_tile = _key_tiles(
                item, window, sink_tiles, page_size, G, BM, BN, CAUSAL, WINDOW, BODY
            )
            token0 = gl.load(item)
            new = gl.load(item + 1)
            position = gl.load(item + 2)
            row0 = gl.load(item + 3)
            base = gl.load(item + 5)
            end = gl.load(item + 6)
            part = gl.load(item + 8)
            first = position + row0 // G
            last = position + gl.minimum(row0 + BM - 1, new * G - 1) // G
            row0 += HALF * ROWS

            first_head = (head0 + head) * G

            # Into the operand's swizzled rows.
            q = load_queries(q_ptr, item, first_head, q_token, q_head, G, D, DP, ROWS, HALF)
            q_half.store(q.to(dtype))
            fence_async_shared()

            # What a row sees: keys [low, limit), and the sink tokens.
            rows = row0 + gl.arange(0, ROWS, s_rows)
            at_position = position + rows // G
            limit = at_position * 0 + end
            first_limit = end
            if CAUSAL:
                if BODY:
                    limit = gl.maximum(near_page(at_position, page_size), 0) * page_size
                    limit = gl.minimum(limit, end)
                    first_limit = gl.maximum(near_page(first, page_size), 0) * page_size
                    first_limit = gl.minimum(first_limit, end)
                else:
                    limit = gl.minimum(at_position + 1, end)
                    first_limit = gl.minimum(first + 1, end)
            low = at_position - window + 1
            last_low = 0
            if WINDOW:
                last_low = last - window + 1
            if BODY:
                last_low = gl.maximum(last_low, page_size)

            m, mass = start_rows(sinks_ptr, first_head + rows % G, ROWS, s_rows, SINKS, SHIFT)
            acc = gl.zeros([ROWS, DVP], gl.float32, o_layout)
            out_rows = row0 + gl.arange(0, ROWS, o_rows)
            out_row = (token0 + out_rows // G).to(gl.int64) * q_heads + first_head + out_rows % G
            out_row += part.to(gl.int64) * part_rows
            out_channel = gl.arange(0, DVP, gl.SliceLayout(0, o_layout))
            out_at = out_row[:, None] * DV + out_channel[None, :]
            out_keep = (out_rows < new * G)[:, None] & (out_channel < DV)[None, :]
            lse_at = (token0 + rows // G).to(gl.int64) * q_heads + first_head + rows % G
            lse_at += part.to(gl.int64) * part_rows
            stage = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            k = k_smem.index(stage).permute((1, 0))
            s = warpgroup_mma(q_half, k, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            key0 = gl.where(sink_tiles > 0, 0, base + low_tile * BN)
            masked = (key0 + BN > first_limit) | (key0 < last_low)
            p16, alpha, m, mass = _softmax(
                s, m, mass, scale, cap, key0, masked, limit, low, end, sink_tokens, page_size,
                s_layout, p_layout, dtype, BN, WINDOW, BODY, SOFTCAP, SHIFT,
            )  # fmt: skip
            acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
            after = (count + 1) % STAGES
            after_phase = ((count + 1) // STAGES) & 1
            mbarrier.wait(k_full.index(after), after_phase, pred=tiles > 1)
            for j in range(1, tiles):
                k = k_smem.index(after).permute((1, 0))
                s_token = warpgroup_mma(q_half, k, zero, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), phase)
                acc_token = warpgroup_mma(p16, v_smem.index(stage), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s_token,))
                mbarrier.arrive(k_empty.index(after), count=1)
                key0 = gl.where(j < sink_tiles, j * BN, base + (j - sink_tiles + low_tile) * BN)
                masked = (key0 + BN > first_limit) | (key0 < last_low)
                p16, alpha, m, mass = _softmax(
                    s, m, mass, scale, cap, key0, masked, limit, low, end, sink_tokens, page_size,
                    s_layout, p_layout, dtype, BN, WINDOW, BODY, SOFTCAP, SHIFT,
                )  # fmt: skip
                done = stage
                count += 1
                stage = after
                phase = after_phase
                after = (count + 1) % STAGES
                after_phase = ((count + 1) // STAGES) & 1
                # Waiting for the next keys here, and naming p16, keeps the softmax in front of the
                # wait for the values' product: assemblers move a bare wait up.
                mbarrier.wait(k_full.index(after), after_phase, pred=j + 1 < tiles)
                acc, p16 = warpgroup_mma_wait(0, deps=(acc_token, p16))
                mbarrier.arrive(v_empty.index(done), count=1)
                acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
            mbarrier.wait(v_full.index(stage), phase)
            acc_token = warpgroup_mma(p16, v_smem.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc_token,))
            mbarrier.arrive(v_empty.index(stage), count=1)
            count += 1

            o, lse = finish(acc, m, mass, o_rows, SHIFT)
            if V_STATIC:
                at_scale = (head0 + head).to(gl.int64) * vs_head
                o = given_scales(
                    o, m, mass, sinks_ptr, first_head + rows % G, v_scale + at_scale,
                    v_zero + at_scale, DV, V_GROUPS, V_ZERO, SINKS, SHIFT, o_layout, DVP,
                )  # fmt: skip
            if CARRY:
                before = gl.load(carry_lse_ptr + lse_at, mask=rows < new * G, other=-float("inf"))
                before = before * LOG2E
                top = gl.maximum(before, lse)
                top = gl.where(top == -float("inf"), 0.0, top)
                both = gl.exp2(before - top) + gl.exp2(lse - top)
                both = gl.where(both == 0.0, 1.0, both)
                old = gl.load(carry_ptr + out_at, mask=out_keep, other=0.0)
                o = (
                    o * gl.convert_layout(gl.exp2(lse - top) / both, o_rows)[:, None]
                    + old * gl.convert_layout(gl.exp2(before - top) / both, o_rows)[:, None]
                )
                none = (before == -float("inf")) & (lse == -float("inf"))
                lse = gl.where(none, -float("inf"), top + gl.log2(both))
            lse = lse * LN2
            gl.store(out_ptr + out_at, o.to(out_ptr.dtype.element_ty), mask=out_keep)
            if lse_ptr is not None:
                gl.store(lse_ptr + lse_at, lse, mask=rows < new * G)


@gluon.jit(
    do_not_specialize=[
        "rounds",
        "heads",
        "head0",
        "head_rows",
        "part_rows",
        "window",
        "sink_tokens",
        "sink_tiles",
    ]
)
def prefill_kernel(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, carry_ptr, carry_lse_ptr, sinks_ptr, v_scale, v_zero,
    vs_head, order, work,
    rounds, heads, head0, head_rows, part_rows, q_heads, q_token, q_head, scale, cap, window,
    sink_tokens, sink_tiles, page_size, G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, DP: gl.constexpr, DVP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BODY: gl.constexpr, SOFTCAP: gl.constexpr,
    SINKS: gl.constexpr, CARRY: gl.constexpr, SHIFT: gl.constexpr, V_STATIC: gl.constexpr,
    V_ZERO: gl.constexpr, V_GROUPS: gl.constexpr,
):  # fmt: skip
    """One launch over all work items of one workspace; see the module."""
    dtype: gl.constexpr = k_desc.dtype
    q_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DP], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [BM, DP], q_shared)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, DP], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, DVP], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    start_barriers(k_full, k_empty, STAGES)
    start_barriers(v_full, v_empty, STAGES)
    gl.warp_specialize(
        [
            (_consumer, (
                q_ptr, out_ptr, lse_ptr, carry_ptr, carry_lse_ptr, sinks_ptr, v_scale, v_zero,
                vs_head, order, work, q_smem,
                k_smem, v_smem, k_full, k_empty, v_full, v_empty, rounds, heads, head0, part_rows,
                q_heads, q_token, q_head, scale, cap, window, sink_tokens, sink_tiles, page_size,
                G, D, DV, BM, BN, DP, DVP, 0, STAGES, CAUSAL, WINDOW, BODY, SOFTCAP, SINKS, CARRY,
                SHIFT, V_STATIC, V_ZERO, V_GROUPS,
            )),
            (_consumer, (
                q_ptr, out_ptr, lse_ptr, carry_ptr, carry_lse_ptr, sinks_ptr, v_scale, v_zero,
                vs_head, order, work, q_smem,
                k_smem, v_smem, k_full, k_empty, v_full, v_empty, rounds, heads, head0, part_rows,
                q_heads, q_token, q_head, scale, cap, window, sink_tokens, sink_tiles, page_size,
                G, D, DV, BM, BN, DP, DVP, 1, STAGES, CAUSAL, WINDOW, BODY, SOFTCAP, SINKS, CARRY,
                SHIFT, V_STATIC, V_ZERO, V_GROUPS,
            )),
            (_producer, (
                k_desc, v_desc, order, work, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                rounds, heads, head_rows, window, sink_tiles, page_size, G, BM, BN, STAGES, CAUSAL,
                WINDOW, BODY,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
