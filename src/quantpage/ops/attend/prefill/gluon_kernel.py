"""Causal attention on Hopper: one TMA warp feeds two warpgroups of wgmma.

The kernel reads K and V as dense 16-bit rows (a workspace that gather fills), and queries where
they lie. A tile is BM rows of (token, query head of one kv_head) pairs: packing the group makes a
tile of a short chunk full, and lets any group size share the K and V that it reads.

Of a cache with exact pages the first page lies where its codes would, and near pages are further
key tiles behind those of the codes: from the first that is near to a tile's first row up to its
last row.

What a consumer does with a key tile, and in which order, is flash/gluon_parts. The warp that copies
keys copies a tile's queries first, while consumers are at the tile before: they would wait for
memory otherwise, and nothing would be multiplied. Tried on an H200 and left out, as no faster:
turns between the consumers by barriers, keys from the last to the first, and consumers that ask for
the next tile's queries behind the last product of this one (4 to 7 % slower).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.flash.gluon_parts import (
    READERS,
    Pair,
    Ring,
    attend_tiles,
    copy_tile,
    finish,
    finite,
    given_scales,
    load_queries,
    stage_of,
    start_barriers,
    start_rows,
    store_rows,
)
from quantpage.ops.attend.flash.triton_items import NEW, POSITION, ROW, TOKEN
from quantpage.ops.attend.flash.triton_segments import near_page
from quantpage.ops.attend.prefill.triton_work import (
    BASE,
    END,
    FIELDS,
    PART,
    REQUEST,
    WORKSPACE_ROW,
)
from quantpage.ops.triton.common import LN2, LOG2E
from quantpage.ops.triton.gluon_compat import async_copy, fence_async_shared, mbarrier, tma_load


@gluon.jit
def _key_tiles(
    item, window, sink_tiles, page_size, G: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BODY: gl.constexpr, EXACT: gl.constexpr,
    NEAR: gl.constexpr,
):  # fmt: skip
    """Key tiles of one work item before those of near pages: how many, and the first one after the
    sink tiles.
    """
    new = gl.load(item + NEW)
    position = gl.load(item + POSITION)
    row = gl.load(item + ROW)
    base = gl.load(item + BASE)
    end = gl.load(item + END)
    first = position + row // G
    last = position + gl.minimum(row + BM - 1, new * G - 1) // G
    high = end
    if CAUSAL:
        body_high = gl.maximum(near_page(last, page_size), 0) * page_size
        high = gl.minimum(body_high if BODY or EXACT else last + 1, end)
    low = 0
    if WINDOW:
        low = first - window + 1
    if BODY:
        low = gl.maximum(low, page_size)
    low_tile = gl.maximum(low - base, 0) // BN
    high_tile = (gl.maximum(high - base, 0) + BN - 1) // BN
    # At least one tile, so that every barrier is used; a row without keys masks all of it.
    least = 1
    if NEAR:
        least = gl.minimum(gl.load(item + PART), 1)
    count = gl.maximum(sink_tiles + gl.maximum(high_tile - low_tile, 0), least)
    return count, low_tile


@gluon.jit
def _near_tiles(
    item, page_size, G: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """Tiles of near pages of one work item, which the first part of a request's keys has: how many,
    their first key, and the first key of the request's.
    """
    count = 0
    first_key = 0
    request_key = 0
    if NEAR:
        position = gl.load(item + POSITION)
        row = gl.load(item + ROW)
        last = position + gl.minimum(row + BM - 1, gl.load(item + NEW) * G - 1) // G
        first_key = gl.maximum(near_page(position + row // G, page_size), 0) * page_size
        request_key = gl.maximum(near_page(position, page_size), 0) * page_size
        count = gl.where(gl.load(item + PART) == 0, (last - first_key) // BN + 1, 0)
    return count, first_key, request_key


@gluon.jit
def _producer(
    k_desc, v_desc, order, work, near_rows, asked, rings, rounds, heads, head0, head_rows, window,
    sink_tiles, page_size, G: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BODY: gl.constexpr,
    EXACT: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    pid = gl.program_id(0)
    grid = gl.num_programs(0)
    count = 0
    taken = 0
    for turn in range(rounds):
        tile = gl.load(order + turn * grid + pid)
        if tile >= 0:
            head = tile % heads
            item = work + tile // heads * FIELDS
            if asked.desc is not None:
                # While consumers are at the last keys of the tile before.
                mbarrier.wait(asked.empty, (taken & 1) ^ 1)
                mbarrier.expect(asked.full, asked.desc.block_type.nbytes)
                token = gl.load(item + TOKEN) + gl.load(item + ROW) // G
                tma_load(asked.desc, [token, (head0 + head) * G, 0], asked.full, asked.rows)
                taken += 1
            tiles, low_tile = _key_tiles(
                item, window, sink_tiles, page_size, G, BM, BN, CAUSAL, WINDOW, BODY, EXACT, NEAR
            )
            row = head * head_rows + gl.load(item + WORKSPACE_ROW)
            near, near_key, request_key = _near_tiles(item, page_size, G, BM, BN, NEAR)
            near_row = row
            if NEAR:
                near_row = head * head_rows + gl.load(near_rows + gl.load(item + REQUEST))
                near_row += near_key - request_key
            for j in range(tiles + near):
                at = row + gl.where(j < sink_tiles, j, j + low_tile) * BN
                if NEAR:
                    at = gl.where(j < tiles, at, near_row + (j - tiles) * BN)
                stage, phase = stage_of(count, STAGES)
                # The first turn finds every stage empty: a consumer's parity, turned over.
                copy_tile(k_desc, at, rings.k, stage, phase ^ 1)
                copy_tile(v_desc, at, rings.v, stage, phase ^ 1)
                count += 1


class Asked(NamedTuple):
    """Queries that are copied ahead, as they lie."""

    desc: Any
    """None: consumers load them."""
    rows: Any
    """Shared memory, [tokens, query heads of a kv_head, channels]."""
    full: Any
    """A barrier: they have landed."""
    empty: Any
    """A barrier: both consumers have them in registers."""


class Walk(NamedTuple):
    """What a consumer's rows see of a work item, and where its key tiles are."""

    limit: Any
    """End of each row's keys."""
    low: Any
    """First key of each row's window."""
    first_limit: Any
    """The first row's limit: tiles that end before it need no mask."""
    last_low: Any
    """The last row's first key: tiles that begin there or later need none."""
    base: Any
    low_tile: Any
    sink_tiles: Any
    sink_tokens: Any
    page_size: Any
    positions: Any
    """Of each row."""
    first: Any
    """Position of the first row."""
    last_near: Any
    """First near key of the last row: tiles from there to the first row need no mask."""
    tiles: Any
    """Before those of near pages."""
    near_key: Any
    """First key of the latter."""
    BN: gl.constexpr
    WINDOW: gl.constexpr
    BODY: gl.constexpr
    NEAR: gl.constexpr
    s_layout: gl.constexpr


@gluon.jit
def _ask(walk, j, ahead):
    """Causal tiles are known by their number."""
    return 0, ahead


@gluon.jit
def _judge(walk, j, asked, FIRST: gl.constexpr):
    """Whether some row does not see all of tile j, and the tile's first key."""
    if FIRST:
        key0 = gl.where(walk.sink_tiles > 0, 0, walk.base + walk.low_tile * walk.BN)
    else:
        later = walk.base + (j - walk.sink_tiles + walk.low_tile) * walk.BN
        key0 = gl.where(j < walk.sink_tiles, j * walk.BN, later)
    masked = (key0 + walk.BN > walk.first_limit) | (key0 < walk.last_low)
    if walk.NEAR:
        near = j >= walk.tiles
        near0 = walk.near_key + (j - walk.tiles) * walk.BN
        near_masked = (near0 + walk.BN > walk.first + 1) | (near0 < walk.last_near)
        if walk.WINDOW:
            near_masked = near_masked | (near0 < walk.last_low)
        return gl.where(near, near_masked, masked), (gl.where(near, near0, key0), near)
    else:
        return masked, (key0, 0)


@gluon.jit
def _hide(s, facts, walk):
    """Scores of invisible pairs become -inf."""
    key0, near = facts
    keys = (key0 + gl.arange(0, walk.BN, gl.SliceLayout(0, walk.s_layout)))[None, :]
    if walk.NEAR:
        low = gl.maximum(near_page(walk.positions, walk.page_size), 0) * walk.page_size
        low = gl.where(near, low, 0)
        end = gl.where(near, walk.positions + 1, walk.limit)
        # One comparison for both ends: what lies before the first is very large without a sign.
        seen = (keys - low[:, None]).to(gl.uint32) < (end - low).to(gl.uint32)[:, None]
    else:
        seen = keys < walk.limit[:, None]
    if walk.WINDOW:
        seen = seen & ((keys >= walk.low[:, None]) | (keys < walk.sink_tokens))
    if walk.BODY:
        seen = seen & (keys >= walk.page_size)
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _consume(
    q_ptr, out_ptr, lse_ptr, carry_ptr, carry_lse_ptr, sinks_ptr, v_scale, v_zero, vs_head, order,
    work, q_smem, asked, rings, rounds, heads, head0, part_rows, q_heads, q_token,
    q_head, scale, cap, window, sink_tokens, sink_tiles, page_size, G: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DP: gl.constexpr,
    DVP: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, BODY: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
    CARRY: gl.constexpr, EXACT: gl.constexpr, NEAR: gl.constexpr, SHIFT: gl.constexpr,
    V_STATIC: gl.constexpr, V_ZERO: gl.constexpr, V_GROUPS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_smem.dtype
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
    taken = 0
    for turn in range(rounds):
        tile = gl.load(order + turn * grid + pid)
        if tile >= 0:
            head = tile % heads
            item = work + tile // heads * FIELDS
            tiles, low_tile = _key_tiles(
                item, window, sink_tiles, page_size, G, BM, BN, CAUSAL, WINDOW, BODY, EXACT, NEAR
            )
            near, near_key, _ = _near_tiles(item, page_size, G, BM, BN, NEAR)
            token0 = gl.load(item + TOKEN)
            new = gl.load(item + NEW)
            position = gl.load(item + POSITION)
            row0 = gl.load(item + ROW)
            base = gl.load(item + BASE)
            end = gl.load(item + END)
            part = gl.load(item + PART)
            first = position + row0 // G
            last = position + gl.minimum(row0 + BM - 1, new * G - 1) // G
            row0 += HALF * ROWS

            first_head = (head0 + head) * G

            # Into the operand's swizzled rows.
            if asked.desc is None:
                q = load_queries(q_ptr, item, first_head, q_token, q_head, G, D, DP, ROWS, HALF)
            else:
                layout: gl.constexpr = gl.BlockedLayout(
                    [1, 8], [256 // DP, DP // 8], [4, 1], [1, 0]
                )
                mbarrier.wait(asked.full, taken & 1)
                q = finite(asked.rows.reshape([BM, DP]).slice(HALF * ROWS, ROWS).load(layout))
                async_copy.mbarrier_arrive(asked.empty, increment_count=False)
                taken += 1
            q_half.store(q.to(dtype))
            fence_async_shared()

            # What a row sees: keys [low, limit), and the sink tokens.
            rows = row0 + gl.arange(0, ROWS, s_rows)
            at_position = position + rows // G
            limit = at_position * 0 + end
            first_limit = end
            if CAUSAL:
                if BODY or EXACT:
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
            acc, m, mass, count = attend_tiles(
                q_half, rings, count, tiles + near, m, mass, acc, zero,
                Walk(
                    limit, low, first_limit, last_low, base, low_tile, sink_tiles,
                    sink_tokens, page_size, at_position, first,
                    gl.maximum(near_page(last, page_size), 0) * page_size, tiles, near_key,
                    BN, WINDOW, BODY, NEAR, s_layout,
                ),
                _ask, _judge, _hide, 0, scale, cap, p_layout, o_rows, dtype, SOFTCAP, SHIFT,
                STAGES,
            )  # fmt: skip

            o, lse = finish(acc, m, mass, o_rows, SHIFT)
            if V_STATIC:
                at_scale = (head0 + head).to(gl.int64) * vs_head
                o = given_scales(
                    o, m, mass, sinks_ptr, first_head + rows % G, v_scale + at_scale,
                    v_zero + at_scale, DV, V_GROUPS, V_ZERO, SINKS, SHIFT, o_layout, DVP,
                )  # fmt: skip
            # Worked out here: before the tiles its registers would be held through all of them.
            lse_at = (token0 + rows // G).to(gl.int64) * q_heads + first_head + rows % G
            lse_at += part.to(gl.int64) * part_rows
            if CARRY:
                before = gl.load(carry_lse_ptr + lse_at, mask=rows < new * G, other=-float("inf"))
                before = before * LOG2E
                top = gl.maximum(before, lse)
                top = gl.where(top == -float("inf"), 0.0, top)
                both = gl.exp2(before - top) + gl.exp2(lse - top)
                both = gl.where(both == 0.0, 1.0, both)
                out_rows = row0 + gl.arange(0, ROWS, o_rows)
                out_at = (token0 + out_rows // G).to(gl.int64) * q_heads
                out_at += first_head + out_rows % G
                channel = gl.arange(0, DVP, gl.SliceLayout(0, o_layout))[None, :]
                keep = (out_rows < new * G)[:, None] & (channel < DV)
                old = gl.load(carry_ptr + out_at[:, None] * DV + channel, mask=keep, other=0.0)
                o = (
                    o * gl.convert_layout(gl.exp2(lse - top) / both, o_rows)[:, None]
                    + old * gl.convert_layout(gl.exp2(before - top) / both, o_rows)[:, None]
                )
                none = (before == -float("inf")) & (lse == -float("inf"))
                lse = gl.where(none, -float("inf"), top + gl.log2(both))
            lse = lse * LN2
            store_rows(
                out_ptr, o, q_half, part.to(gl.int64) * part_rows, token0, row0, new, q_heads,
                first_head, G, DV,
            )  # fmt: skip
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
    q_ptr, q_desc, k_desc, v_desc, out_ptr, lse_ptr, carry_ptr, carry_lse_ptr, sinks_ptr, v_scale,
    v_zero, vs_head, order, work, near_rows,
    rounds, heads, head0, head_rows, part_rows, q_heads, q_token, q_head, scale, cap, window,
    sink_tokens, sink_tiles, page_size, G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, DP: gl.constexpr, DVP: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BODY: gl.constexpr, SOFTCAP: gl.constexpr,
    SINKS: gl.constexpr, CARRY: gl.constexpr, EXACT: gl.constexpr, NEAR: gl.constexpr,
    SHIFT: gl.constexpr, V_STATIC: gl.constexpr, V_ZERO: gl.constexpr, V_GROUPS: gl.constexpr,
):  # fmt: skip
    """One launch over all work items of one workspace; see the module.

    q_desc: gluon_launch.query_tiles, where queries are copied ahead; None: consumers load them.
    BODY: codes from the first page's end to the near pages. EXACT: to the near pages, over a first
    page that is exact. NEAR: the near pages too; near_rows: plan.ExactRows.near, else None.
    """
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
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=READERS)
    q_rows = q_smem
    if q_desc is not None:
        q_rows = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_shape, q_desc.layout)
    asked = Asked(q_desc, q_rows, q_full, q_empty)
    _roles(
        (
            q_ptr, out_ptr, lse_ptr, carry_ptr, carry_lse_ptr, sinks_ptr, v_scale, v_zero, vs_head,
            order, work, q_smem, asked,
            Pair(Ring(k_smem, k_full, k_empty), Ring(v_smem, v_full, v_empty)), rounds, heads,
            head0, part_rows, q_heads, q_token, q_head, scale, cap, window, sink_tokens, sink_tiles,
            page_size, G, D, DV, BM, BN, DP, DVP, STAGES, CAUSAL, WINDOW, BODY, SOFTCAP, SINKS,
            CARRY, EXACT, NEAR, SHIFT, V_STATIC, V_ZERO, V_GROUPS,
        ),
        (
            k_desc, v_desc, order, work, near_rows, asked,
            Pair(Ring(k_smem, k_full, k_empty), Ring(v_smem, v_full, v_empty)), rounds, heads,
            head0, head_rows, window, sink_tiles, page_size, G, BM, BN, STAGES, CAUSAL, WINDOW,
            BODY, EXACT, NEAR,
        ),
    )  # fmt: skip


@gluon.jit
def _consumer(given, HALF: gl.constexpr):
    """One half of each tile's rows."""
    _consume(*given, HALF)


@gluon.jit
def _roles(consumer, producer):
    """Two consumers, one half of a tile's rows each, and the warp that copies for them."""
    gl.warp_specialize(
        [(_consumer, (consumer, 0)), (_consumer, (consumer, 1)), (_producer, producer)],
        [4, 4],
        [240, 24],
    )
