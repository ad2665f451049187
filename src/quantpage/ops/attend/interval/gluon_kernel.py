"""Interval masks on Hopper: one TMA warp feeds two warpgroups of wgmma with the planned key tiles.

The sibling of prefill/gluon_kernel (read that first: tiles, pipeline and softmax are its own). What
differs is where key tiles come from: the planner's list of the query tile, partial tiles first, of
which only those load the mask's integers. The TMA warp reads the list one entry ahead, so that
scattered tiles cost no more than neighbours. Each thread reads the bounds of one key, before the
scores are there, and makes of them a word with a bit for every token of the tile: a pair then costs
two instructions, whatever the mask.

Work is ordered by the planned visits, longest first, on the device: programs take turns through
the order and back, which evens out what a static share can.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.flash.gluon_parts import (
    Pair,
    Ring,
    attend_tiles,
    copy_tile,
    finish,
    given_scales,
    load_queries,
    stage_of,
    start_barriers,
    start_rows,
)
from quantpage.ops.attend.flash.triton_items import NEW, POSITION, ROW, TOKEN
from quantpage.ops.attend.flash.triton_segments import NEAR, near_queries
from quantpage.ops.triton.common import LN2, Constant
from quantpage.ops.triton.gluon_compat import fence_async_shared, mbarrier

# Argument lists stay in rows.
# fmt: off
WORK_FIELDS = Constant(8)
"""int32 a work item: those of flash/triton_items, these three, one unused."""
WORKSPACE_ROW = Constant(4)
REQUEST = Constant(5)
CONTEXT = Constant(6)


@dataclass(frozen=True, slots=True)
class Fixed:
    """What is compiled in: one constant, whose fields are constants."""

    G: int
    D: int
    DV: int
    BM: int
    BN: int
    DP: int
    DVP: int
    STAGES: int
    VECTORS: int
    CAUSAL: bool
    RANGES: int
    PER_HEAD: bool
    SHARED: bool
    BODY: bool
    SOFTCAP: bool
    SINKS: bool
    SHIFT: int
    V_STATIC: bool
    V_ZERO: bool
    V_GROUPS: int


@gluon.constexpr_function
def _fixed(*given):
    return Fixed(*given)


class Items(NamedTuple):
    """The work items of a launch, in their order, times the heads of its pass."""

    order: Any
    work: Any
    rounds: Any
    items: Any
    heads: Any
    head0: Any


class Lists(NamedTuple):
    """Key tiles of each work item: the planner's lists, and how many are full and partial."""

    tiles: Any
    counts: Any
    capacity: Any
    heads: Any


class Mask(NamedTuple):
    """The mask's integers (masks/columns, masks/rows) and how far those of requests are apart."""

    integers: Any
    spans: Any
    width: Any
    batch: Any
    head: Any
    page_size: Any


class Queries(NamedTuple):
    """Query rows, what they are multiplied by, and where their results go."""

    q: Any
    out: Any
    lse: Any
    sinks: Any
    heads: Any
    token: Any
    head: Any
    scale: Any
    cap: Any


class GivenScales(NamedTuple):
    """Those of values, which outputs are multiplied by."""

    scale: Any
    zero: Any
    head: Any


@gluon.jit
def _tile_of(items, turn):
    """Item, head of the pass, and whether there is one: turns run through the order and back."""
    pid = gl.program_id(0)
    grid = gl.num_programs(0)
    at = turn * grid + gl.where(turn % 2 == 0, pid, grid - 1 - pid)
    real = at < items.items * items.heads
    index = gl.load(items.order + gl.where(real, at // items.heads, 0))
    return index, at % items.heads, real


@gluon.jit
def _visits(lists, index, head, PER_HEAD: gl.constexpr):
    """Where the list of a work item is, and how many of its tiles are full and partial."""
    at = index.to(gl.int64) * lists.heads
    if PER_HEAD:
        at += head
    visits, counts = lists.tiles + at * lists.capacity, lists.counts + at * 2
    return visits, gl.load(counts), gl.load(counts + 1)


@gluon.jit
def _key_tile(visits, visit, full, partial, capacity):
    """Partial tiles (the list's back), then full ones; tile 0 where the list is empty."""
    at = gl.where(visit < partial, capacity - 1 - visit, visit - partial)
    some = (full + partial > 0) & (visit < full + partial)
    return gl.load(visits + at, mask=some, other=0)


@gluon.jit
def _producer(k_desc, v_desc, items, lists, rings, head_rows, FIXED: gl.constexpr):
    count = 0
    for turn in range(items.rounds):
        index, head, real = _tile_of(items, turn)
        if real:
            visits, full, partial = _visits(lists, index, items.head0 + head, FIXED.PER_HEAD)
            row = head * head_rows + gl.load(items.work + index * WORK_FIELDS + WORKSPACE_ROW)
            after = _key_tile(visits, 0, full, partial, lists.capacity)
            # At least one tile, so that every barrier is used.
            for visit in range(gl.maximum(full + partial, 1)):
                at = row + after * FIXED.BN
                after = _key_tile(visits, visit + 1, full, partial, lists.capacity)
                stage, phase = stage_of(count, FIXED.STAGES)
                # The first turn finds every stage empty: a consumer's parity, turned over.
                copy_tile(k_desc, at, rings.k, stage, phase ^ 1)
                copy_tile(v_desc, at, rings.v, stage, phase ^ 1)
                count += 1


@gluon.jit
def _bounds(
    mask, width, length, key0, wanted, BN: gl.constexpr, VECTORS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """lts, lte, uts, ute of a tile's keys (masks/columns), a key a thread: asked for early."""
    keys = key0 + gl.arange(0, BN, gl.BlockedLayout([1], [32], [4], [0]))
    inside = keys < length
    asked = inside & wanted
    lts = keys * 0 + 2147483647
    lte = gl.where(inside, 2147483647, 0)
    uts = keys * 0
    ute = keys
    if VECTORS > 0:
        lts = gl.load(mask + keys, mask=asked, other=2147483647)
    if VECTORS == 4 or (VECTORS == 2 and CAUSAL):
        lte = gl.load(mask + width + keys, mask=asked, other=0)
    if VECTORS == 4:
        uts = gl.load(mask + 2 * width + keys, mask=asked, other=0)
    if VECTORS > 1 and not CAUSAL:
        ute = gl.load(mask + (VECTORS - 1) * width + keys, mask=asked, other=0)
        ute = gl.where(inside, ute, keys)
    return lts, lte, uts, ute


@gluon.jit
def _below(row, base, WIDE: gl.constexpr):
    """A word with a bit for each of the tile's tokens that stands before position ``row``."""
    bits = gl.minimum(gl.maximum(row - base, 0), 64 if WIDE else 32)
    if WIDE:
        one = gl.full_like(bits, 1).to(gl.int64)
        return gl.where(bits >= 64, -one, (one << gl.minimum(bits, 63).to(gl.int64)) - one)
    else:
        return gl.where(bits >= 32, -1, (1 << gl.minimum(bits, 31)) - 1)


@gluon.jit
def _column_words(
    key0, base, lts, lte, uts, ute, context, page_size, BN: gl.constexpr, BODY: gl.constexpr,
    WIDE: gl.constexpr,
):
    """A word a key: bit t says that the tile's token t, at position base + t, sees the key."""
    keys = key0 + gl.arange(0, BN, gl.BlockedLayout([1], [32], [4], [0]))
    hidden = _below(lte, base, WIDE) & ~_below(lts, base, WIDE)
    hidden = hidden | (_below(ute, base, WIDE) & ~_below(uts, base, WIDE))
    gone = keys >= context
    if BODY:
        gone = gone | (keys < page_size)
        first, end = near_queries(keys, page_size)
        hidden = hidden | (_below(end, base, WIDE) & ~_below(first, base, WIDE))
    return ~gl.where(gone, hidden * 0 - 1, hidden)


@gluon.jit
def _masked_rows(
    s, key0, positions, mask, described, length, context, page_size, s_layout: gl.constexpr,
    BN: gl.constexpr, RANGES: gl.constexpr, BODY: gl.constexpr,
):
    """Scores of pairs that a row mask hides become -inf (masks/rows)."""
    k = (key0 + gl.arange(0, BN, gl.SliceLayout(0, s_layout)))[None, :]
    q = positions[:, None]
    end_of_rows = described + length
    before = (positions < described) | (length == 0)
    past = (positions >= end_of_rows) & (length > 0)
    index = gl.maximum(gl.minimum(positions - described, length - 1), 0)
    seen = past[:, None] & (k >= end_of_rows) & (k <= q)
    for slot in gl.static_range(RANGES):
        at = mask + (index.to(gl.int64) * RANGES + slot) * 2
        start = gl.load(at)
        end = gl.load(at + 1)
        end = gl.where(past, gl.minimum(end, end_of_rows), end)
        start = gl.where(before, 0, start)
        end = gl.where(before, positions * (slot == 0) + (slot == 0), end)
        seen = seen | ((k >= start[:, None]) & (k < end[:, None]))
    seen = seen & (k < context)
    if BODY:
        # No near_pairs, written out: compiled from that it takes other registers, not timed yet.
        behind = q // page_size - k // page_size
        seen = seen & (k >= page_size) & ((behind < 0) | (behind > NEAR))
    return gl.where(seen, s, -float("inf"))


class Walk(NamedTuple):
    """A query tile's list of key tiles, and the mask of its pairs."""

    visits: Any
    full: Any
    partial: Any
    masked_visits: Any
    """The first so many of the list need the mask."""
    capacity: Any
    mask: Any
    width: Any
    described: Any
    length: Any
    positions: Any
    base: Any
    """Position of the half's first token."""
    context: Any
    page_size: Any
    FIXED: gl.constexpr
    s_layout: gl.constexpr


@gluon.jit
def _ask(walk, visit, key0):
    """The mask's integers for the tile from key0 on, and where the next tile begins."""
    FIXED: gl.constexpr = walk.FIXED
    bounds = _bounds(
        walk.mask, walk.width, walk.length, key0, visit < walk.masked_visits, FIXED.BN,
        FIXED.VECTORS, FIXED.CAUSAL,
    )
    after = _key_tile(walk.visits, visit + 1, walk.full, walk.partial, walk.capacity) * FIXED.BN
    return (key0, bounds), after


@gluon.jit
def _judge(walk, visit, asked, FIRST: gl.constexpr):
    return visit < walk.masked_visits, asked


@gluon.jit
def _hide(s, asked, walk):
    """Scores of pairs that the mask hides become -inf."""
    FIXED: gl.constexpr = walk.FIXED
    key0, bounds = asked
    if FIXED.RANGES == 0:
        lts, lte, uts, ute = bounds
        words = _column_words(
            key0, walk.base, lts, lte, uts, ute, walk.context, walk.page_size, FIXED.BN, FIXED.BODY,
            FIXED.G == 1,
        )
        words = gl.convert_layout(words, gl.SliceLayout(0, walk.s_layout))[None, :]
        token = walk.positions - walk.base
        one = gl.full_like(token, 1).to(words.dtype)
        own = (one << token.to(words.dtype))[:, None]
        s = gl.where((words & own) != 0, s, -float("inf"))
    else:
        s = _masked_rows(
            s, key0, walk.positions, walk.mask, walk.described, walk.length, walk.context,
            walk.page_size, walk.s_layout, FIXED.BN, FIXED.RANGES, FIXED.BODY,
        )
    return s


@gluon.jit
def _consume(
    given, scales, items, lists, mask, q_smem, rings, FIXED: gl.constexpr, HALF: gl.constexpr
):
    dtype: gl.constexpr = q_smem.dtype
    G: gl.constexpr = FIXED.G
    DV: gl.constexpr = FIXED.DV
    DVP: gl.constexpr = FIXED.DVP
    BN: gl.constexpr = FIXED.BN
    SINKS: gl.constexpr = FIXED.SINKS
    SHIFT: gl.constexpr = FIXED.SHIFT
    ROWS: gl.constexpr = FIXED.BM // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DVP, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_half = q_smem.slice(HALF * ROWS, ROWS)
    zero = gl.zeros([ROWS, BN], gl.float32, s_layout)
    count = 0
    for turn in range(items.rounds):
        index, head, real = _tile_of(items, turn)
        if real:
            visits, full, partial = _visits(lists, index, items.head0 + head, FIXED.PER_HEAD)
            total_visits = gl.maximum(full + partial, 1)
            # An empty list visits tile 0 with a mask that shows none of it.
            masked_visits = total_visits - full
            item = items.work + index * WORK_FIELDS
            token0 = gl.load(item + TOKEN)
            new = gl.load(item + NEW)
            position = gl.load(item + POSITION)
            row0 = gl.load(item + ROW) + HALF * ROWS
            request = gl.load(item + REQUEST)
            context = gl.load(item + CONTEXT)
            span = mask.spans + (0 if FIXED.SHARED else request * 2)
            described = gl.load(span)
            length = gl.load(span + 1)
            integers = mask.integers + request.to(gl.int64) * mask.batch
            if FIXED.PER_HEAD:
                integers += (items.head0 + head).to(gl.int64) * mask.head
            first_head = (items.head0 + head) * G

            # Into the operand's swizzled rows.
            q = load_queries(
                given.q, item, first_head, given.token, given.head, G, FIXED.D, FIXED.DP, ROWS, HALF
            )
            q_half.store(q.to(dtype))
            fence_async_shared()

            rows = row0 + gl.arange(0, ROWS, s_rows)
            positions = position + rows // G
            # The first token of this half: a half spans at most 32 tokens, 64 where G is 1.
            base = position + row0 // G
            m, mass = start_rows(given.sinks, first_head + rows % G, ROWS, s_rows, SINKS, SHIFT)
            acc = gl.zeros([ROWS, DVP], gl.float32, o_layout)
            acc, m, mass, count = attend_tiles(
                q_half, rings, count, total_visits, m, mass, acc, zero,
                Walk(
                    visits, full, partial, masked_visits, lists.capacity, integers, mask.width,
                    described, length, positions, base, context, mask.page_size, FIXED, s_layout,
                ),
                _ask, _judge, _hide, _key_tile(visits, 0, full, partial, lists.capacity) * BN,
                given.scale, given.cap, p_layout, o_rows, dtype, FIXED.SOFTCAP, SHIFT, FIXED.STAGES,
            )

            o, lse = finish(acc, m, mass, o_rows, SHIFT)
            if FIXED.V_STATIC:
                at_scale = (items.head0 + head).to(gl.int64) * scales.head
                o = given_scales(
                    o, m, mass, given.sinks, first_head + rows % G, scales.scale + at_scale,
                    scales.zero + at_scale, DV, FIXED.V_GROUPS, FIXED.V_ZERO, SINKS, SHIFT,
                    o_layout, DVP,
                )
            # Worked out here: before the tiles its registers would be held through all of them.
            out_rows = row0 + gl.arange(0, ROWS, o_rows)
            out_row = (token0 + out_rows // G).to(gl.int64) * given.heads
            out_row = out_row + first_head + out_rows % G
            out_channel = gl.arange(0, DVP, gl.SliceLayout(0, o_layout))
            out_at = out_row[:, None] * DV + out_channel[None, :]
            out_keep = (out_rows < new * G)[:, None] & (out_channel < DV)[None, :]
            gl.store(given.out + out_at, o.to(given.out.dtype.element_ty), mask=out_keep)
            if given.lse is not None:
                lse_at = (token0 + rows // G).to(gl.int64) * given.heads + first_head + rows % G
                gl.store(given.lse + lse_at, lse * LN2, mask=rows < new * G)


@gluon.jit(
    do_not_specialize=["rounds", "items", "heads", "head0", "head_rows", "width", "capacity"]
)
def mask_kernel(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, sinks_ptr, v_scale, v_zero, vs_head, order, work,
    tiles, counts, mask_ptr,
    spans, rounds, items, heads, head0, head_rows, q_heads, q_token, q_head, scale, cap, width,
    m_batch, m_head, capacity, mask_heads, page_size, G: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, DP: gl.constexpr, DVP: gl.constexpr,
    STAGES: gl.constexpr, VECTORS: gl.constexpr, CAUSAL: gl.constexpr, RANGES: gl.constexpr,
    PER_HEAD: gl.constexpr, SHARED: gl.constexpr, BODY: gl.constexpr, SOFTCAP: gl.constexpr,
    SINKS: gl.constexpr, SHIFT: gl.constexpr, V_STATIC: gl.constexpr, V_ZERO: gl.constexpr,
    V_GROUPS: gl.constexpr,
):
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
    FIXED: gl.constexpr = _fixed(
        G, D, DV, BM, BN, DP, DVP, STAGES, VECTORS, CAUSAL, RANGES, PER_HEAD, SHARED, BODY, SOFTCAP,
        SINKS, SHIFT, V_STATIC, V_ZERO, V_GROUPS,
    )
    rings = Pair(Ring(k_smem, k_full, k_empty), Ring(v_smem, v_full, v_empty))
    items_given = Items(order, work, rounds, items, heads, head0)
    lists = Lists(tiles, counts, capacity, mask_heads)
    _roles(
        (
            Queries(q_ptr, out_ptr, lse_ptr, sinks_ptr, q_heads, q_token, q_head, scale, cap),
            GivenScales(v_scale, v_zero, vs_head), items_given, lists,
            Mask(mask_ptr, spans, width, m_batch, m_head, page_size), q_smem, rings, FIXED,
        ),
        (k_desc, v_desc, items_given, lists, rings, head_rows, FIXED),
    )


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
