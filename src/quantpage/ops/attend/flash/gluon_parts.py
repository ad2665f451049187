"""What the two Hopper kernels share: rings of copies, the tile body of a consumer, its ends.

Order inside a consumer, one key tile t at a time: the scores of t+1 are issued before the values
of t are multiplied, and the softmax of t+1 runs while they are (FlashAttention-3, arXiv 2407.08608
section 3.2). The two consumers drift apart by themselves, so that one's softmax hides behind the
other's matrix products.

A row's scores are shifted by its running maximum minus SHIFT, which keeps small probabilities out
of fp16's subnormals at no cost: 2**SHIFT cancels in the output.

It moves only where scores leave it behind by more than BEHIND: what is exponentiated in between is
larger by up to 2**BEHIND, which cancels too. So in nearly every key tile but a row's first no
maximum of a warp moves, its threads exchange none, and it jumps over rescaling its output
(FlashAttention-4 does that on Blackwell), which stood between two products of a consumer: it needs
the result of one, and the next waits for it.
"""

import struct
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.flash.triton_items import NEW, ROW, TOKEN
from quantpage.ops.triton.common import LOG2E, Constant
from quantpage.ops.triton.gluon_compat import (
    async_copy,
    mbarrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

READERS = Constant(256)
"""Threads of two consumers."""
BEHIND = 7
"""A probability is at most 2**(BEHIND + SHIFT): 32,768 in float16."""


class Ring(NamedTuple):
    """Stages that the TMA warp fills, one tile each, and both consumers empty, in turn."""

    slots: Any
    """Shared memory, [stages, keys, channels]."""
    full: Any
    """A barrier a stage: its copy has landed."""
    empty: Any
    """A barrier a stage: all threads of both consumers have read it."""


class Pair(NamedTuple):
    """The rings of keys and of values; tile number n is in the same stage of both."""

    k: Ring
    v: Ring


@gluon.jit
def stage_of(count, STAGES: gl.constexpr):
    """Where tile number ``count`` lies, and the parity of its barriers' turn."""
    return count % STAGES, (count // STAGES) & 1


@gluon.jit
def copy_tile(desc, at, ring, stage, phase):
    """Ask for rows from ``at`` on when the stage is empty."""
    mbarrier.wait(ring.empty.index(stage), phase)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes)
    tma_load(desc, [at, 0], ring.full.index(stage), ring.slots.index(stage))


@gluon.jit
def give_back(ring, stage):
    """This thread has read a stage. Each says so for itself, as if copies of its own had landed, of
    which it has none: one for all would wait for the others of its warpgroup first."""
    async_copy.mbarrier_arrive(ring.empty.index(stage), increment_count=False)


@gluon.jit
def load_queries(
    q_ptr, item, first_head, q_token, q_head, G: gl.constexpr, D: gl.constexpr, DP: gl.constexpr,
    ROWS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """A consumer's half of a work item's queries as they lie, [ROWS, DP]; 0 past the request.

    item: see flash/triton_items.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    packed = gl.load(item + ROW) + HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, DP, gl.SliceLayout(0, layout))
    token = gl.load(item + TOKEN) + packed // G
    at = token.to(gl.int64) * q_token + (first_head + packed % G).to(gl.int64) * q_head
    keep = (packed < gl.load(item + NEW) * G)[:, None] & (channel < D)[None, :]
    return finite(gl.load(q_ptr + at[:, None] + channel[None, :], mask=keep, other=0.0))


@gluon.jit
def finite(q):
    """An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is."""
    return gl.where(gl.abs(q.to(gl.float32)) < float("inf"), q, float("nan"))


@gluon.jit
def start_rows(
    sinks_ptr, heads, ROWS: gl.constexpr, layout: gl.constexpr, SINKS: gl.constexpr,
    SHIFT: gl.constexpr,
):  # fmt: skip
    """Maximum and mass of rows before their first key; heads: each row's query head."""
    m = gl.full([ROWS], -float("inf"), gl.float32, layout)
    mass = gl.full([ROWS], 0.0, gl.float32, layout)
    if SINKS:
        m = gl.load(sinks_ptr + heads).to(gl.float32) * LOG2E
        mass = gl.full([ROWS], 2.0**SHIFT, gl.float32, layout)
    return m, mass


@gluon.jit
def capped(s, scale, cap):
    """cap * tanh(x), tanh from exp2 (accurate; tanh.approx would cost cap * 5e-4 in the logit)."""
    return cap - 2.0 * cap / (1.0 + gl.exp2(s * scale))


@gluon.jit
def by_thread(rows):
    """[rows, blocks of 8, 4, 2] of a product's result: the third axis is the four threads of a row,
    so that what is reduced over the others stays in a thread."""
    return gl.reshape(rows, [rows.shape[0], rows.shape[1] // 8, 4, 2])


@gluon.jit
def in_threads(of_rows, layout: gl.constexpr):
    """[rows, 4] in ``layout``: what a row has, for each of its threads."""
    held = gl.convert_layout(of_rows, gl.SliceLayout(1, layout))[:, None]
    return held + gl.zeros([of_rows.shape[0], 4], gl.float32, layout)


def _moved(own: str, before: str, maximum: str, factor: str) -> str:
    """Assembly: a row's maximum and its factor, moved if its scores leave it behind."""
    return (
        f"shfl.sync.bfly.b32 other, {own}, 1, 0x1f, 0xffffffff; max.f32 top, {own}, other; "
        "shfl.sync.bfly.b32 other, top, 2, 0x1f, 0xffffffff; max.f32 top, top, other; "
        f"add.f32 other, {before}, {BOUND}; setp.gt.f32 moves, top, other; "
        f"sub.f32 other, {before}, top; ex2.approx.ftz.f32 other, other; "
        f"selp.f32 {maximum}, top, {before}, moves; selp.f32 {factor}, other, {ONE}, moves; "
    )


BOUND, ONE = (f"0f{struct.pack('>f', number).hex()}" for number in (BEHIND, 1))
"""As PTX spells them."""
_MAXIMA = Constant(
    "{ .reg .pred moves, any; .reg .f32 top, other; "
    f"add.f32 other, $8, {BOUND}; setp.gt.f32 moves, $6, other; "
    f"add.f32 other, $9, {BOUND}; @!moves setp.gt.f32 moves, $7, other; "
    "vote.sync.any.pred any, moves, 0xffffffff; "
    f"mov.f32 $0, $8; mov.f32 $1, $9; mov.f32 $2, {ONE}; mov.f32 $3, {ONE}; "
    "selp.s32 $4, 1, 0, any; selp.s32 $5, 1, 0, any; @!any bra.uni KEPT; "
    f"{_moved('$6', '$8', '$0', '$2')} {_moved('$7', '$9', '$1', '$3')} KEPT: }}"
)
"""Of a thread's two rows maxima, factors of what was made with those before, and whether any of the
warp's moves, which is asked before threads exchange any; from its own scores' and those before."""
_SUMS = Constant(
    "{ .reg .f32 other; "
    + " ".join(
        f"shfl.sync.bfly.b32 other, {own}, {lane}, 0x1f, 0xffffffff; add.f32 {row}, {own}, other;"
        for lane, given in ((1, ("$2", "$3")), (2, ("$0", "$1")))
        for own, row in zip(given, ("$0", "$1"), strict=True)
    )
    + " }"
)
"""Of a thread's two rows what their threads have together."""


@gluon.jit
def online_softmax(s, m, mass, scale, SHIFT: gl.constexpr):
    """One tile of scores into maxima and sums [rows, 4], alike in a row; the scale is per log2.

    Returns probabilities, what the output so far is multiplied by, whether that is another number
    than 1 in any row of the warp, maxima, sums.
    """
    each = by_thread(s)
    own = gl.max(gl.max(each, 3), 1) * scale
    # Results are written before operands are read for the last time: "&".
    m, alpha, moved = gl.inline_asm_elementwise(
        _MAXIMA, "=&f,=&f,=&f,=&f,=&r,=&r,f,f,f,f", [own, m], (gl.float32, gl.float32, gl.int32),
        is_pure=True, pack=2,
    )  # fmt: skip
    shift = gl.where(m == -float("inf"), 0.0, m - SHIFT)
    p = gl.exp2(each * scale - shift[:, None, :, None])
    # That threads meet here keeps the exponentials in front of the wait for keys: sums that each
    # keeps for itself let an assembler move them behind it.
    made = gl.sum(gl.sum(p, 3), 1)
    made = gl.inline_asm_elementwise(_SUMS, "=&f,=&f,f,f", [made], gl.float32, is_pure=True, pack=2)
    return gl.reshape(p, s.shape), alpha, moved, m, mass * alpha + made


def _rescaling(numbers: int) -> Constant:
    """Assembly: a thread's numbers times their factors, unless nothing of its warp has moved."""
    scaled = [f"mul.f32 ${at}, ${at}, ${2 * numbers + at};" for at in range(numbers)]
    return Constant(
        f"{{ .reg .pred kept; setp.eq.s32 kept, ${3 * numbers}, 0; @kept bra.uni KEPT; "
        f"{' '.join(scaled)} KEPT: }}"
    )


def _rescaled(numbers: int) -> Constant:
    """Its operands: results, numbers in the same registers, factors, whether any has moved."""
    same = ",".join(map(str, range(numbers)))
    return Constant(f"{'=f,' * numbers}{same}{',f' * numbers}{',r' * numbers}")


_RESCALING_32, _RESCALED_32 = _rescaling(32), _rescaled(32)
_RESCALING_64, _RESCALED_64 = _rescaling(64), _rescaled(64)


@gluon.jit
def rescaled(acc, alpha, moved):
    """A product's result times ``alpha``, as ``online_softmax`` gives both."""
    each = by_thread(acc)
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, each.type.layout))
    factor = gl.convert_layout(alpha, rows)[:, None, :, None]
    given = [each, factor, gl.convert_layout(moved, rows)[:, None, :, None]]
    if acc.shape[1] == 64:
        made = gl.inline_asm_elementwise(
            _RESCALING_32, _RESCALED_32, given, gl.float32, is_pure=True, pack=32
        )
    else:
        made = gl.inline_asm_elementwise(
            _RESCALING_64, _RESCALED_64, given, gl.float32, is_pure=True, pack=64
        )
    return gl.convert_layout(gl.reshape(made, acc.shape), acc.type.layout)


@gluon.jit
def finish(acc, m, mass, layout: gl.constexpr, SHIFT: gl.constexpr):
    """Output and log2-sum-exp2; layout: of the output's rows."""
    total = gl.where(mass == 0.0, 1.0, mass)
    lse = gl.where(mass == 0.0, -float("inf"), m - SHIFT + gl.log2(total))
    return acc * gl.convert_layout(1.0 / total, layout)[:, None], lse


@gluon.jit
def given_scales(
    o, m, mass, sinks_ptr, heads, v_scale, v_zero, DV: gl.constexpr, V_GROUPS: gl.constexpr,
    V_ZERO: gl.constexpr, SINKS: gl.constexpr, SHIFT: gl.constexpr, o_layout: gl.constexpr,
    DVP: gl.constexpr,
):  # fmt: skip
    """Outputs over codes as outputs over numbers; v_scale, v_zero: of the kv_head."""
    channel = gl.arange(0, DVP, gl.SliceLayout(0, o_layout))
    inside = channel < DV
    own = channel // (DV // V_GROUPS)
    scale = gl.load(v_scale + own, mask=inside, other=0.0).to(gl.float32)
    o = o * scale[None, :]
    if V_ZERO:
        # A sink logit has no value: the zero belongs to what the keys alone weigh.
        weight = gl.where(mass == 0.0, 0.0, 1.0)
        if SINKS:
            sink = gl.load(sinks_ptr + heads).to(gl.float32) * LOG2E
            weight -= gl.exp2(sink - m + SHIFT) / gl.where(mass == 0.0, 1.0, mass)
        zero = gl.load(v_zero + own, mask=inside, other=0.0).to(gl.float32)
        weight = gl.convert_layout(weight, gl.SliceLayout(1, o_layout))
        o += weight[:, None] * zero[None, :]
    return o


@gluon.jit
def store_rows(
    out_ptr, o, q_half, first_row, token0, row0, new, q_heads, first_head, G: gl.constexpr,
    DV: gl.constexpr,
):  # fmt: skip
    """A consumer's outputs to out [tokens, q_heads, DV] from row ``first_row`` on; row0: its first
    packed row of the request at token0, which has ``new`` tokens.

    16-bit outputs go through the shared memory of the queries, which nobody reads any more: a
    thread then stores 16 bytes of a row, where the product leaves 4 with it.
    """
    ROWS: gl.constexpr = o.shape[0]
    WIDTH: gl.constexpr = o.shape[1]
    kind: gl.constexpr = out_ptr.dtype.element_ty
    # Rows of 256 channels would be parked in local memory.
    wide: gl.constexpr = kind.primitive_bitwidth == 16 and q_half.shape[1] == WIDTH and WIDTH <= 128
    layout: gl.constexpr = (
        gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
        if wide
        else o.type.layout
    )
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    row = (token0 + packed // G).to(gl.int64) * q_heads + first_head + packed % G + first_row
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    keep = (packed < new * G)[:, None] & (channel < DV)[None, :]
    made = o.to(kind)
    if wide:
        q_half.store(made.to(q_half.dtype, bitcast=True))
        made = q_half.load(layout).to(kind, bitcast=True)
    gl.store(out_ptr + row[:, None] * DV + channel[None, :], made, mask=keep)


@gluon.jit
def start_barriers(full, empty, STAGES: gl.constexpr):
    """A stage is filled by one producer and emptied by two consumers."""
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)


@gluon.jit
def attend_tiles(
    q_half, rings, count, tiles, m, mass, acc, zero, walk, ask, judge, hide, ahead, scale, cap,
    p_layout: gl.constexpr, o_rows: gl.constexpr, dtype: gl.constexpr, SOFTCAP: gl.constexpr,
    SHIFT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer's ``tiles`` key tiles, at least one: output, maximum, mass, and the next count.

    Probabilities become operands behind the wait for the product that reads the last ones: before
    it they would be made in other registers and moved.

    The kernel says by three functions what its rows see:

        ask(walk, j, ahead)            what tile j needs, asked for before its product is issued,
                                       and what is known ahead of tile j + 1
        judge(walk, j, asked, FIRST)   when the scores are there: whether to mask, and by what
        hide(s, facts, walk)           scores of invisible pairs become -inf
    """
    stage, phase = stage_of(count, STAGES)
    asked, ahead = ask(walk, 0, ahead)
    mbarrier.wait(rings.k.full.index(stage), phase)
    k = rings.k.slots.index(stage).permute((1, 0))
    s = warpgroup_mma(q_half, k, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    give_back(rings.k, stage)
    masked, facts = judge(walk, 0, asked, True)
    rows: gl.constexpr = m.type.layout
    threads: gl.constexpr = gl.max(gl.max(by_thread(zero), 3), 1).type.layout
    m, mass = in_threads(m, threads), in_threads(mass, threads)
    # There is no output yet to be multiplied.
    p, _, _, m, mass = _softmax(s, m, mass, scale, cap, masked, facts, walk, hide, SOFTCAP, SHIFT)
    p16 = gl.convert_layout(p.to(dtype), p_layout)
    after, after_phase = stage_of(count + 1, STAGES)
    mbarrier.wait(rings.k.full.index(after), after_phase, pred=tiles > 1)
    for j in range(1, tiles):
        asked, ahead = ask(walk, j, ahead)
        k = rings.k.slots.index(after).permute((1, 0))
        s_token = warpgroup_mma(q_half, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(rings.v.full.index(stage), phase)
        acc_token = warpgroup_mma(p16, rings.v.slots.index(stage), acc, is_async=True)
        # One product may be under way: that of the values, behind which the softmax runs.
        s = warpgroup_mma_wait(1, deps=(s_token,))
        give_back(rings.k, after)
        masked, facts = judge(walk, j, asked, False)
        p, alpha, moved, m, mass = _softmax(
            s, m, mass, scale, cap, masked, facts, walk, hide, SOFTCAP, SHIFT
        )
        done = stage
        count += 1
        stage = after
        phase = after_phase
        after, after_phase = stage_of(count + 1, STAGES)
        # Waiting for the next keys here, and naming the probabilities, keeps the softmax in front
        # of the wait for the values' product: assemblers move a bare wait up.
        mbarrier.wait(rings.k.full.index(after), after_phase, pred=j + 1 < tiles)
        acc, p = warpgroup_mma_wait(0, deps=(acc_token, p))
        p16 = gl.convert_layout(p.to(dtype), p_layout)
        give_back(rings.v, done)
        acc = rescaled(acc, alpha, moved)
    mbarrier.wait(rings.v.full.index(stage), phase)
    acc_token = warpgroup_mma(p16, rings.v.slots.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc_token,))
    give_back(rings.v, stage)
    m = gl.convert_layout(gl.max(m, 1), rows)
    return acc, m, gl.convert_layout(gl.max(mass, 1), rows), count + 1


@gluon.jit
def _softmax(
    s, m, mass, scale, cap, masked, facts, walk, hide, SOFTCAP: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    """One tile of scores, its hidden pairs hidden, into the running maximum and sum."""
    if SOFTCAP:
        s = capped(s, scale, cap)
        scale = 1.0
    if masked:
        s = hide(s, facts, walk)
    return online_softmax(s, m, mass, scale, SHIFT)
