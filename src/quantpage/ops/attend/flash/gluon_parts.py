"""What the two Hopper kernels share: queries to registers, the running softmax, its end, barriers.

A row's scores are shifted by its running maximum minus SHIFT, which keeps small probabilities out
of fp16's subnormals at no cost: 2**SHIFT cancels in the output.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.triton.common import LOG2E
from quantpage.ops.triton.gluon_compat import mbarrier


@gluon.jit
def load_queries(
    q_ptr, item, first_head, q_token, q_head, G: gl.constexpr, D: gl.constexpr, DP: gl.constexpr,
    ROWS: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """A consumer's half of a work item's queries as they lie, [ROWS, DP]; 0 past the request.

    item: its token row, new tokens and first packed row at 0, 1 and 3.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    packed = gl.load(item + 3) + HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, DP, gl.SliceLayout(0, layout))
    token = gl.load(item) + packed // G
    at = token.to(gl.int64) * q_token + (first_head + packed % G).to(gl.int64) * q_head
    keep = (packed < gl.load(item + 1) * G)[:, None] & (channel < D)[None, :]
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
def online_softmax(
    s, m, mass, scale, p_layout: gl.constexpr, dtype: gl.constexpr, SHIFT: gl.constexpr
):
    """One tile of scores into the running maximum and sum; the scale is per log2.

    Returns probabilities as an operand, what the output so far is multiplied by, maximum, mass.
    """
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    shift = gl.where(m_new == -float("inf"), 0.0, m_new - SHIFT)
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(m - SHIFT - shift)
    mass = mass * alpha + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), p_layout), alpha, m_new, mass


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
