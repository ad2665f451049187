"""What the two Hopper kernels share: rings of copies, the tile body of a consumer, its ends.

Order inside a consumer, one key tile t at a time: the scores of t+1 are issued before the values
of t are multiplied, and the softmax of t+1 runs while they are (FlashAttention-3, arXiv 2407.08608
section 3.2). The two consumers drift apart by themselves, so that one's softmax hides behind the
other's matrix products.

A row's scores are shifted by its running maximum minus SHIFT, which keeps small probabilities out
of fp16's subnormals at no cost: 2**SHIFT cancels in the output.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.flash.triton_items import NEW, ROW, TOKEN
from quantpage.ops.triton.common import LOG2E
from quantpage.ops.triton.gluon_compat import mbarrier, tma_load, warpgroup_mma, warpgroup_mma_wait


class Ring(NamedTuple):
    """Stages that the TMA warp fills, one tile each, and both consumers empty, in turn."""

    slots: Any
    """Shared memory, [stages, keys, channels]."""
    full: Any
    """A barrier a stage: its copy has landed."""
    empty: Any
    """A barrier a stage: both consumers have read it."""


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
    q = gl.load(q_ptr + at[:, None] + channel[None, :], mask=keep, other=0.0)
    # An infinite query would weigh keys by 0 or 1: its result is NaN, as a NaN's is.
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
def online_softmax(s, m, mass, scale, SHIFT: gl.constexpr):
    """One tile of scores into the running maximum and sum; the scale is per log2.

    Returns probabilities, what the output so far is multiplied by, maximum, mass.
    """
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    shift = gl.where(m_new == -float("inf"), 0.0, m_new - SHIFT)
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(m - SHIFT - shift)
    mass = mass * alpha + gl.sum(p, 1)
    return p, alpha, m_new, mass


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
def start_barriers(full, empty, STAGES: gl.constexpr):
    """A stage is filled by one producer and emptied by two consumers."""
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)


@gluon.jit
def attend_tiles(
    q_half, rings, count, tiles, m, mass, acc, zero, walk, ask, judge, hide, ahead, scale, cap,
    p_layout: gl.constexpr, o_rows: gl.constexpr, dtype: gl.constexpr, SOFTCAP: gl.constexpr,
    SHIFT: gl.constexpr, STAGES: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """A consumer's ``tiles`` key tiles, at least one: output, maximum, mass, and the next count.

    LATE: probabilities become operands behind the wait for the product that reads the last ones;
    before it they are made in other registers and moved.

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
    mbarrier.arrive(rings.k.empty.index(stage), count=1)
    masked, facts = judge(walk, 0, asked, True)
    p, alpha, m, mass = _softmax(s, m, mass, scale, cap, masked, facts, walk, hide, SOFTCAP, SHIFT)
    p16 = gl.convert_layout(p.to(dtype), p_layout)
    acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
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
        mbarrier.arrive(rings.k.empty.index(after), count=1)
        masked, facts = judge(walk, j, asked, False)
        p, alpha, m, mass = _softmax(
            s, m, mass, scale, cap, masked, facts, walk, hide, SOFTCAP, SHIFT
        )
        done = stage
        count += 1
        stage = after
        phase = after_phase
        after, after_phase = stage_of(count + 1, STAGES)
        if not LATE:
            p16 = gl.convert_layout(p.to(dtype), p_layout)
        # Waiting for the next keys here, and naming the probabilities, keeps the softmax in front
        # of the wait for the values' product: assemblers move a bare wait up.
        mbarrier.wait(rings.k.full.index(after), after_phase, pred=j + 1 < tiles)
        if LATE:
            acc, p = warpgroup_mma_wait(0, deps=(acc_token, p))
            p16 = gl.convert_layout(p.to(dtype), p_layout)
        else:
            acc, p16 = warpgroup_mma_wait(0, deps=(acc_token, p16))
        mbarrier.arrive(rings.v.empty.index(done), count=1)
        acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
    mbarrier.wait(rings.v.full.index(stage), phase)
    acc_token = warpgroup_mma(p16, rings.v.slots.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc_token,))
    mbarrier.arrive(rings.v.empty.index(stage), count=1)
    return acc, m, mass, count + 1


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
