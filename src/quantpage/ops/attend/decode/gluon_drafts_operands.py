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

from quantpage.ops.attend.decode.gluon_operands import INT4_UNITS, fixed_queries, nibbles
from quantpage.ops.attend.decode.gluon_share import shown_keys
from quantpage.ops.attend.flash.gluon_parts import stage_of
from quantpage.ops.triton import codes as triton_codes
from quantpage.ops.triton.common import A_TOKEN, FP8, INT4, Constant
from quantpage.ops.triton.gluon_compat import mbarrier, tma_load, warpgroup_mma, warpgroup_mma_wait

to_float16 = gluon.jit(triton_codes.to_float16.fn)

POWER = Constant(12)
"""log2 of about the largest value of a tile, as it is multiplied."""


class KeyNumbers(NamedTuple):
    """Shared memory for what belongs to each key of two tiles, [2, keys]."""

    k_scale: Any
    k_zero: Any
    """Of codes as they are multiplied: 4-bit ones are 8 too large. Float32, as the scales are."""
    v_scale: Any
    v_zero: Any
    """Float16, times a power of two that a tile's values share (``unit_of``)."""


@gluon.jit
def key_numbers_memory(TILE: gl.constexpr):
    """Room for those."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return KeyNumbers(
        gl.allocate_shared_memory(gl.float32, [3, TILE], layout),
        gl.allocate_shared_memory(gl.float32, [3, TILE], layout),
        gl.allocate_shared_memory(gl.float16, [3, TILE], layout),
        gl.allocate_shared_memory(gl.float16, [3, TILE], layout),
    )


@gluon.jit
def of_tile(memory, nth):
    """Those of one of the two tiles."""
    return KeyNumbers(
        memory.k_scale.index(nth),
        memory.k_zero.index(nth),
        memory.v_scale.index(nth),
        memory.v_zero.index(nth),
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
def copy_tile(keys, values, turns, count, page, head, slot, FIXED: gl.constexpr):
    """Ask for a tile's codes, scales and zeros when there is room: keys from ``slot`` on of a page.
    count: tiles before.
    """
    stage, phase = stage_of(count, FIXED.STAGES)
    # The first turn finds every stage empty: a taker's parity, turned over.
    mbarrier.wait(turns.taken.index(stage), phase ^ 1)
    landed = turns.landed.index(stage)
    K_BESIDE: gl.constexpr = FIXED.K_SCALES == A_TOKEN
    V_BESIDE: gl.constexpr = FIXED.V_SCALES == A_TOKEN
    K_SCALE: gl.constexpr = keys.scale.block_type.nbytes if K_BESIDE else 0
    V_SCALE: gl.constexpr = values.scale.block_type.nbytes if V_BESIDE else 0
    K_EACH: gl.constexpr = keys.zero.block_type.nbytes if K_BESIDE and FIXED.K_ZERO else 0
    V_EACH: gl.constexpr = values.zero.block_type.nbytes if V_BESIDE and FIXED.V_ZERO else 0
    codes: gl.constexpr = keys.pages.block_type.nbytes + values.pages.block_type.nbytes
    mbarrier.expect(landed, codes + K_SCALE + V_SCALE + K_EACH + V_EACH)
    rows, each = [page, head, slot, 0], [page, head, slot]
    tma_load(keys.pages, rows, landed, keys.codes.index(stage))
    tma_load(values.pages, rows, landed, values.codes.index(stage))
    if K_BESIDE:
        tma_load(keys.scale, each, landed, keys.scales.index(stage))
        if FIXED.K_ZERO:
            tma_load(keys.zero, each, landed, keys.zeros.index(stage))
    if V_BESIDE:
        tma_load(values.scale, each, landed, values.scales.index(stage))
        if FIXED.V_ZERO:
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
    """4-bit keys of a tile as they are multiplied: bytes, 8 too large; of 32 channels the even ones
    before the odd ones (store_queries), so that what is stored meets every bank once.
    """
    TILE: gl.constexpr = codes.shape[0]
    ROW: gl.constexpr = codes.shape[1]
    first, second = nibbles(codes)
    both = gl.reshape(gl.join(first, second), [TILE, ROW // 16, 16, 2])
    return gl.reshape(gl.permute(both, (0, 1, 3, 2)), [TILE, 2 * ROW])


@gluon.jit
def beside_values(beside, row: gl.constexpr, FIXED: gl.constexpr):
    """Scales and zeros of a tile's values, whose rows have so many bytes, as threads take them."""
    rows: gl.constexpr = gl.SliceLayout(1, bytes_layout(row))
    scale, zero = 1.0, 0.0
    if FIXED.V_SCALES == A_TOKEN:
        scale = beside.v_scale.load(rows)
        zero = beside.v_zero.load(rows) if FIXED.V_ZERO else scale
    return scale, zero


@gluon.jit
def store_values(to, codes, scale, zero, key_start, shown, FIXED: gl.constexpr):
    """Values of a tile in float16, into shared memory: codes where their scales are channels', else
    what they stand for, by the scales beside them. Columns of 4-bit ones are in the order that
    in_order undoes.
    """
    if FIXED.V_CODE == FP8:
        # Slots that no query sees may hold NaN.
        key = key_start + gl.arange(0, codes.shape[0], gl.SliceLayout(1, codes.type.layout))
        codes = gl.where(seen_keys(key, shown, FIXED.WINDOW, FIXED.SEGMENT)[:, None], codes, 0)
    if FIXED.V_CODE == INT4:
        first, second = gl.inline_asm_elementwise(
            # Of a word's eight channels i and i + 4, two at a time.
            INT4_UNITS, "=r,=r,=r,=r,r", [codes], dtype=(gl.float16, gl.float16), is_pure=True,
            pack=4,
        )  # fmt: skip
        if FIXED.V_SCALES == A_TOKEN:
            first = _scaled(first, scale[:, None], zero[:, None], FIXED.V_ZERO)
            second = _scaled(second, scale[:, None], zero[:, None], FIXED.V_ZERO)
        v = _halves(first, second)
    else:
        v = to_float16(codes, FIXED.V_CODE, False)
        if FIXED.V_SCALES == A_TOKEN:
            v = _scaled(v, scale[:, None], zero[:, None], FIXED.V_ZERO)
    to.store(v)


@gluon.jit
def _scaled(v, scale, zero, ZERO: gl.constexpr):
    """Two neighbours at a time, which Triton does one by one."""
    if ZERO:
        v = gl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [v, scale, zero], dtype=gl.float16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        v = gl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [v, scale], dtype=gl.float16, is_pure=True, pack=2
        )
    return v


@gluon.jit
def seen_keys(key, shown, WINDOW: gl.constexpr, SEGMENT: gl.constexpr):
    """Keys that some query sees."""
    return shown_keys(
        key, shown.a_low, shown.a_high, shown.b_low, shown.b_high, shown.first_seat, shown.window,
        shown.sink_tokens, WINDOW, SEGMENT,
    )  # fmt: skip


class Beside(NamedTuple):
    """What lies beside a tile's codes, of two keys a thread in every warp."""

    k_scale: Any
    k_zero: Any
    v_scale: Any
    v_zero: Any


@gluon.jit
def take_planes(keys, values, stage, FIXED: gl.constexpr):
    """A tile's scales and zeros as they lie."""
    TILE: gl.constexpr = keys.codes.shape[3]
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    none = gl.full([TILE], 0.0, gl.float32, layout)
    ks, kz, vs, vz = none, none, none, none
    if FIXED.K_SCALES == A_TOKEN:
        ks = plane(keys.scales, stage, layout)
        if FIXED.K_ZERO:
            kz = plane(keys.zeros, stage, layout)
    if FIXED.V_SCALES == A_TOKEN:
        vs = plane(values.scales, stage, layout)
        if FIXED.V_ZERO:
            vz = plane(values.zeros, stage, layout)
    return Beside(ks, kz, vs, vz)


@gluon.jit
def of_keys_seen(beside, key_start, shown, FIXED: gl.constexpr):
    """What is stored of those (KeyNumbers), and a power of two as its biased exponent (as_power):
    a tile's values are multiplied by it, so that float16 holds them, the largest about 2^12.

    Of keys that no query sees 0: a probability of 0 is multiplied by it.
    """
    ks, kz, vs, vz = beside
    key = key_start + gl.arange(0, ks.shape[0], ks.type.layout)
    seen = seen_keys(key, shown, FIXED.WINDOW, FIXED.SEGMENT)
    ks = gl.where(seen, ks, 0.0)
    kz = gl.where(seen, kz, 0.0)
    if FIXED.K_CODE == INT4:
        kz += ks * -8.0
    vs = gl.where(seen, vs, 0.0)
    vz = gl.where(seen, vz, 0.0)
    bits = 127
    if FIXED.V_SCALES == A_TOKEN:
        CODE: gl.constexpr = FIXED.V_CODE
        LARGEST: gl.constexpr = 8.0 if CODE == INT4 else (512.0 if CODE == FP8 else 128.0)
        size = gl.abs(vs) * LARGEST
        if FIXED.V_ZERO:
            size += gl.abs(vz)
        # Of values that are all 0, or that are as good as that, no more than 2^72.
        size = gl.max(size.to(gl.int32, bitcast=True), 0)
        bits = 254 + POWER - gl.maximum(size >> 23, 67)
        factor = (bits << 23).to(gl.float32, bitcast=True)
        vs = vs * factor
        vz = vz * factor
    return Beside(ks, kz, vs.to(gl.float16), vz.to(gl.float16)), bits


@gluon.jit
def store_numbers(memory, nth, numbers, FIXED: gl.constexpr):
    """What belongs to each key of a tile, as number ``nth`` of two."""
    to = of_tile(memory, nth)
    if FIXED.K_SCALES == A_TOKEN:
        to.k_scale.store(numbers.k_scale)
        if FIXED.K_ZERO or FIXED.K_CODE == INT4:
            to.k_zero.store(numbers.k_zero)
    if FIXED.V_SCALES == A_TOKEN:
        to.v_scale.store(numbers.v_scale)
        if FIXED.V_ZERO:
            to.v_zero.store(numbers.v_zero)


@gluon.jit
def store_queries(smem, asked, ROWS: gl.constexpr, CODE: gl.constexpr, rows_layout: gl.constexpr):
    """Queries [64, channels] into shared memory [2, 64, channels], as the first operand of scores.

    Of 64 rows both numbers lie apart. Of 32, which ``asked`` has twice, the high number is in the
    first of the two rows that a thread has of the product, the low one in the other: one product
    gives both. Returns what a row's scores are multiplied by, and the sum of its queries as
    multiplied.
    """
    WIDTH: gl.constexpr = asked.shape[1]
    size = gl.abs(asked)
    finite = size < float("inf")
    fixed, unit = fixed_queries(asked, gl.where(finite, size, 0.0), finite)
    total = gl.sum(fixed, 1).to(gl.float32) * unit
    if CODE == INT4:
        fixed = gl.permute(gl.reshape(fixed, [64, WIDTH // 32, 16, 2]), (0, 1, 3, 2))
        fixed = gl.reshape(fixed, [64, WIDTH])
    high = (fixed + 64) >> 7
    low = fixed - (high << 7)
    if ROWS == 32:
        nth = gl.arange(0, 64, gl.SliceLayout(1, high.type.layout))
        smem.index(0).store(gl.where((nth % 16 < 8)[:, None], high, low).to(gl.int8))
    else:
        smem.index(0).store(high.to(gl.int8))
        smem.index(1).store(low.to(gl.int8))
    return gl.convert_layout(unit, rows_layout), gl.convert_layout(total, rows_layout)


@gluon.jit
def scores(q_smem, k, no_score, ROWS: gl.constexpr):
    """The products of both numbers of the queries with a tile's keys, under way; of 32 rows one."""
    k = k.permute((1, 0))
    high = warpgroup_mma(q_smem.index(0), k, no_score, use_acc=False, is_async=True)
    low = high
    if ROWS == 64:
        low = warpgroup_mma(q_smem.index(1), k, no_score, use_acc=False, is_async=True)
    return high, low


@gluon.jit
def wait_for_scores(high, low, behind: gl.constexpr, ROWS: gl.constexpr):
    """Until no more than ``behind`` products are under way that began after them."""
    if ROWS == 32:
        high = warpgroup_mma_wait(behind, deps=(high,))
        low = high
    else:
        high, low = warpgroup_mma_wait(behind, deps=(high, low))
    return high, low


@gluon.jit
def whole_scores(high, low, ROWS: gl.constexpr):
    """128 times the high numbers' products plus the low ones', [rows, keys]: exact in int32."""
    if ROWS == 32:
        N: gl.constexpr = high.shape[1]
        high, low = gl.split(gl.permute(gl.reshape(high, [4, 2, 8, N]), (0, 2, 3, 1)))
        high, low = gl.reshape(high, [32, N]), gl.reshape(low, [32, N])
    return high * 128 + low


@gluon.jit
def some_rows(x, ROWS: gl.constexpr):
    """Of [64, n] or [64] the rows that queries have: all, or of 32 those that are the first of the
    two that a thread has.
    """
    if ROWS == 32:
        if len(x.shape) == 2:
            N: gl.constexpr = x.shape[1]
            x, _ = gl.split(gl.permute(gl.reshape(x, [4, 2, 8, N]), (0, 2, 3, 1)))
            x = gl.reshape(x, [32, N])
        else:
            x, _ = gl.split(gl.permute(gl.reshape(x, [4, 2, 8]), (0, 2, 1)))
            x = gl.reshape(x, [32])
    return x


@gluon.jit
def all_rows(x, other):
    """The other way round: [64, n] or [64], ``other`` where no query is."""
    if x.shape[0] == 32:
        both = gl.join(x, other)
        if len(x.shape) == 2:
            N: gl.constexpr = x.shape[1]
            x = gl.reshape(gl.permute(gl.reshape(both, [4, 8, N, 2]), (0, 3, 1, 2)), [64, N])
        else:
            x = gl.reshape(gl.permute(gl.reshape(both, [4, 8, 2]), (0, 2, 1)), [64])
    return x


@gluon.jit
def in_order(o, CODE: gl.constexpr):
    """Outputs [rows, columns] with their channels in order."""
    if CODE == INT4:
        ROWS: gl.constexpr = o.shape[0]
        WIDTH: gl.constexpr = o.shape[1]
        o = gl.permute(gl.reshape(o, [ROWS, 2, WIDTH // 8, 2, 2]), (0, 2, 4, 1, 3))
        o = gl.reshape(o, [ROWS, WIDTH])
    return o
