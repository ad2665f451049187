"""What the Hopper kernel of many query rows multiplies: pages to operands in shared memory.

    K [keys, channels]     bytes: as the copies left them (int8), or unpacked (int4)
    V [keys, channels]     in float16
    q [rows, channels]     two int8 numbers

4-bit codes lie two channels a byte: even channels become the first half of an operand's columns and
odd ones the second; queries have that order too, and outputs are put in their own again at the end.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_operands import fixed_queries, nibbles
from quantpage.ops.attend.decode.gluon_share import shown_keys
from quantpage.ops.attend.flash.gluon_parts import stage_of
from quantpage.ops.triton import codes as triton_codes
from quantpage.ops.triton import words as triton_words
from quantpage.ops.triton.common import A_TOKEN, FP8, INT4, Constant
from quantpage.ops.triton.gluon_compat import mbarrier, tma_load, warpgroup_mma

to_float16 = gluon.jit(triton_codes.to_float16.fn)
log2_fast = gluon.jit(triton_words.log2_fast.fn)
_INT4_PAIRS = Constant(triton_codes.INT4_ASM.value)


class KeyNumbers(NamedTuple):
    """Shared memory for what all rows need of each key of three tiles, float32 [3, keys]."""

    k_scale: Any
    k_zero: Any
    """Of codes as they are multiplied: 4-bit ones are 8 too large."""
    log_v_scale: Any
    light: Any
    """One over the scale of V: p is of p * v_scale, and a row's weight of p."""
    light_zero: Any
    """The zero of V times that."""


@gluon.jit
def key_numbers_memory(TILE: gl.constexpr):
    """Room for those."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return KeyNumbers(
        gl.allocate_shared_memory(gl.float32, [3, TILE], layout),
        gl.allocate_shared_memory(gl.float32, [3, TILE], layout),
        gl.allocate_shared_memory(gl.float32, [3, TILE], layout),
        gl.allocate_shared_memory(gl.float32, [3, TILE], layout),
        gl.allocate_shared_memory(gl.float32, [3, TILE], layout),
    )


@gluon.jit
def of_tile(memory, nth):
    """Those of one of the three tiles."""
    return KeyNumbers(
        memory.k_scale.index(nth),
        memory.k_zero.index(nth),
        memory.log_v_scale.index(nth),
        memory.light.index(nth),
        memory.light_zero.index(nth),
    )


class Shown(NamedTuple):
    """What says which keys of a row some query sees (triton_share)."""

    a_low: Any
    a_high: Any
    b_low: Any
    b_high: Any
    first_seat: Any
    window: Any
    sink_tokens: Any


@gluon.constexpr_function
def bytes_layout(row):
    """Of a tile's bytes as threads take them, sixteen neighbours of a key at a time: what is stored
    of them as float16 meets every bank once.
    """
    registers = [[0, 1], [0, 2], [0, 4], [0, 8]]
    if row == 128:
        lanes = [[0, 16], [0, 32], [1, 0], [0, 64], [2, 0]]
        return gl.DistributedLinearLayout(
            [*registers, [16, 0], [32, 0]], lanes, [[4, 0], [8, 0]], [], [64, row]
        )
    lanes = [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        [*registers, [32, 0]], lanes, [[8, 0], [16, 0]], [], [64, row]
    )


@gluon.constexpr_function
def ring_layout(rows, row, dtype):
    """Of a tile as products read it, and as copies leave it, boxes one below the other."""
    return gl.NVMMASharedLayout.get_default_for([rows, row], dtype)


@gluon.jit
def in_ring(codes):
    """A ring of codes as products and threads read it, [stages, keys, row]."""
    TILE: gl.constexpr = codes.shape[3]
    ROW: gl.constexpr = codes.shape[4]
    layout: gl.constexpr = ring_layout(TILE, ROW, codes.dtype)
    return codes._reinterpret(codes.dtype, [codes.shape[0], TILE, ROW], layout)


class Half(NamedTuple):
    """K or V on its way: TMA descriptors of codes [pages, kv_heads, page, row] and of what a token
    has beside them [pages, kv_heads, page], and rings of a tile a stage.
    """

    pages: Any
    scale: Any
    zero: Any
    codes: Any
    scales: Any
    zeros: Any


class Turns(NamedTuple):
    """A barrier a stage of both rings, each: its tile has landed, everybody has taken it."""

    landed: Any
    taken: Any


@gluon.jit
def half_of(
    pages, scale, zero, STAGES: gl.constexpr, TILE: gl.constexpr, ROW: gl.constexpr,
    SCALES: gl.constexpr, ZERO: gl.constexpr,
):  # fmt: skip
    """A ring. scale, zero: pointers, where they are given for channels, of which none is copied."""
    codes = gl.allocate_shared_memory(pages.dtype, [STAGES, 1, 1, TILE, ROW], pages.layout)
    scales = codes
    zeros = codes
    if SCALES == A_TOKEN:
        scales = gl.allocate_shared_memory(scale.dtype, [STAGES, 1, 1, TILE], scale.layout)
        if ZERO:
            zeros = gl.allocate_shared_memory(zero.dtype, [STAGES, 1, 1, TILE], zero.layout)
    return Half(pages, scale, zero, codes, scales, zeros)


@gluon.jit
def turns_of(STAGES: gl.constexpr):
    """Barriers, which are to be fenced."""
    landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(landed.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    return Turns(landed, taken)


@gluon.jit
def copy_tile(
    keys, values, turns, count, page, head, slot, STAGES: gl.constexpr, K_SCALES: gl.constexpr,
    V_SCALES: gl.constexpr, K_ZERO: gl.constexpr, V_ZERO: gl.constexpr,
):  # fmt: skip
    """Ask for a tile's codes, scales and zeros when there is room: keys from ``slot`` on of a page.
    count: tiles before.
    """
    stage, phase = stage_of(count, STAGES)
    # The first turn finds every stage empty: a taker's parity, turned over.
    mbarrier.wait(turns.taken.index(stage), phase ^ 1)
    landed = turns.landed.index(stage)
    K_SCALE: gl.constexpr = keys.scale.block_type.nbytes if K_SCALES == A_TOKEN else 0
    V_SCALE: gl.constexpr = values.scale.block_type.nbytes if V_SCALES == A_TOKEN else 0
    K_EACH: gl.constexpr = keys.zero.block_type.nbytes if K_SCALES == A_TOKEN and K_ZERO else 0
    V_EACH: gl.constexpr = values.zero.block_type.nbytes if V_SCALES == A_TOKEN and V_ZERO else 0
    codes: gl.constexpr = keys.pages.block_type.nbytes + values.pages.block_type.nbytes
    mbarrier.expect(landed, codes + K_SCALE + V_SCALE + K_EACH + V_EACH)
    rows, each = [page, head, slot, 0], [page, head, slot]
    tma_load(keys.pages, rows, landed, keys.codes.index(stage))
    tma_load(values.pages, rows, landed, values.codes.index(stage))
    if K_SCALES == A_TOKEN:
        tma_load(keys.scale, each, landed, keys.scales.index(stage))
        if K_ZERO:
            tma_load(keys.zero, each, landed, keys.zeros.index(stage))
    if V_SCALES == A_TOKEN:
        tma_load(values.scale, each, landed, values.scales.index(stage))
        if V_ZERO:
            tma_load(values.zero, each, landed, values.zeros.index(stage))


@gluon.jit
def plane(ring, stage, layout: gl.constexpr):
    """Scales or zeros of a tile's keys."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = ring._reinterpret(ring.dtype, [ring.shape[0], ring.shape[3]], flat)
    return tiles.index(stage).load(layout).to(gl.float32)


@gluon.jit
def _halves(first, second):
    """[keys, n] twice -> [keys, 2 n], one beside the other."""
    both = gl.permute(gl.join(first, second), (0, 2, 1))
    return gl.reshape(both, [both.shape[0], 2 * both.shape[2]])


@gluon.jit
def take(tile):
    """A tile's bytes as they lie."""
    return tile.load(bytes_layout(tile.shape[1]))


@gluon.jit
def key_numbers(codes):
    """4-bit keys of a tile as they are multiplied: bytes, 8 too large."""
    first, second = nibbles(codes)
    return _halves(first, second)


@gluon.jit
def value_numbers(
    codes, key_start, shown, CODE: gl.constexpr, WINDOW: gl.constexpr, SEGMENT: gl.constexpr
):
    """Values of a tile in float16."""
    if CODE == FP8:
        # Slots that no query sees may hold NaN.
        key = key_start + gl.arange(0, codes.shape[0], gl.SliceLayout(1, codes.type.layout))
        codes = gl.where(seen_keys(key, shown, WINDOW, SEGMENT)[:, None], codes, 0)
    if CODE == INT4:
        first, second = gl.inline_asm_elementwise(
            _INT4_PAIRS, "=r,=r,=r,=r,r", [codes], dtype=(gl.float16, gl.float16), is_pure=True,
            pack=4,
        )  # fmt: skip
        v = _halves(first, second)
    else:
        v = to_float16(codes, CODE, False)
    return v


@gluon.jit
def seen_keys(key, shown, WINDOW: gl.constexpr, SEGMENT: gl.constexpr):
    """Keys that some query sees."""
    return shown_keys(
        key, shown.a_low, shown.a_high, shown.b_low, shown.b_high, shown.first_seat, shown.window,
        shown.sink_tokens, WINDOW, SEGMENT,
    )  # fmt: skip


@gluon.jit
def store_numbers(
    memory, nth, keys, values, stage, key_start, shown, layout: gl.constexpr, K_CODE: gl.constexpr,
    K_SCALES: gl.constexpr, V_SCALES: gl.constexpr, K_ZERO: gl.constexpr, V_ZERO: gl.constexpr,
    WINDOW: gl.constexpr, SEGMENT: gl.constexpr,
):  # fmt: skip
    """What all rows need of each key of a tile, as number ``nth`` of three. Of keys that no query
    sees 0: a probability of 0 is multiplied by it.
    """
    TILE: gl.constexpr = memory.k_scale.shape[1]
    to = of_tile(memory, nth)
    seen = seen_keys(key_start + gl.arange(0, TILE, layout), shown, WINDOW, SEGMENT)
    if K_SCALES == A_TOKEN:
        scale = plane(keys.scales, stage, layout)
        to.k_scale.store(gl.where(seen, scale, 0.0))
        if K_CODE == INT4:
            zero = scale * -8.0
            if K_ZERO:
                zero += plane(keys.zeros, stage, layout)
            to.k_zero.store(gl.where(seen, zero, 0.0))
        elif K_ZERO:
            to.k_zero.store(gl.where(seen, plane(keys.zeros, stage, layout), 0.0))
    if V_SCALES == A_TOKEN:
        log_vs = log2_fast(gl.maximum(plane(values.scales, stage, layout), 1e-30))
        light = gl.where(seen, gl.exp2(-log_vs), 0.0)
        to.log_v_scale.store(gl.where(seen, log_vs, 0.0))
        to.light.store(light)
        if V_ZERO:
            zero = plane(values.zeros, stage, layout)
            to.light_zero.store(gl.where(seen, light * zero, 0.0))


@gluon.jit
def store_queries(smem, asked, CODE: gl.constexpr, rows_layout: gl.constexpr):
    """Queries into shared memory [2, rows, channels], as the first operand of scores.

    Returns what a row's scores are multiplied by, and the sum of its queries as multiplied.
    """
    ROWS: gl.constexpr = asked.shape[0]
    WIDTH: gl.constexpr = asked.shape[1]
    size = gl.abs(asked)
    finite = size < float("inf")
    fixed, unit = fixed_queries(asked, gl.where(finite, size, 0.0), finite)
    total = gl.sum(fixed, 1).to(gl.float32) * unit
    if CODE == INT4:
        fixed = gl.permute(gl.reshape(fixed, [ROWS, WIDTH // 2, 2]), (0, 2, 1))
        fixed = gl.reshape(fixed, [ROWS, WIDTH])
    high = (fixed + 64) >> 7
    smem.index(0).store(high.to(gl.int8))
    smem.index(1).store((fixed - (high << 7)).to(gl.int8))
    return gl.convert_layout(unit, rows_layout), gl.convert_layout(total, rows_layout)


@gluon.jit
def scores(q_smem, k, no_score):
    """The products of both numbers of the queries with a tile's keys, under way."""
    k = k.permute((1, 0))
    high = warpgroup_mma(q_smem.index(0), k, no_score, use_acc=False, is_async=True)
    low = warpgroup_mma(q_smem.index(1), k, no_score, use_acc=False, is_async=True)
    return high, low


@gluon.jit
def in_order(o, CODE: gl.constexpr):
    """Outputs [rows, columns] with their channels in order."""
    if CODE == INT4:
        ROWS: gl.constexpr = o.shape[0]
        WIDTH: gl.constexpr = o.shape[1]
        o = gl.permute(gl.reshape(o, [ROWS, 2, WIDTH // 2]), (0, 2, 1))
        o = gl.reshape(o, [ROWS, WIDTH])
    return o
