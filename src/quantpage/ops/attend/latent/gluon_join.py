"""How rows end that one program did not walk whole: the last of a row's programs joins its pieces
(decode/triton_pieces does so in Triton), and rows that see no key are finished by somebody.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_rows import with_sink
from quantpage.ops.attend.decode.gluon_share import key_ranges
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.attend.latent.gluon_operands import output_layout
from quantpage.ops.triton.common import LN2
from quantpage.ops.triton.gluon_compat import thread_barrier


@gluon.jit
def arrive(counter, wanted):
    """Whether this program is the last of ``wanted``: then it sees what all of them stored."""
    # Every warp's stores come before the one thread's release.
    thread_barrier()
    last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == wanted - 1
    if last:
        gl.store(counter, 0)
    return last


@gluon.jit
def _piece(results, first_slot, first, nth, FIXED: gl.constexpr, layout: gl.constexpr):
    """Pointers to a piece's outputs [rows, channels of a part] and its log-sum-exps."""
    slot = gl.where(nth == 0, first_slot, 2 * (first + nth)).to(gl.int64)
    row = slot * FIXED.ROWS + gl.arange(0, FIXED.ROWS, gl.SliceLayout(1, layout))
    channel = gl.arange(0, 32 * gl.num_warps(), gl.SliceLayout(0, layout))
    outs = results.part_out + row[:, None] * FIXED.ROW_DIM + channel[None, :]
    return outs, results.part_lse + row


@gluon.jit
def _weighed(outs, weight):
    # Select: a piece that saw nothing was not promised to be finite.
    outs = gl.where((weight != 0)[:, None], gl.load(outs, cache_modifier=".cg"), 0.0)
    return outs * weight[:, None]


@gluon.jit
def join_pieces(results, first_slot, first, count, q_start, q_len, row_first, FIXED: gl.constexpr):
    """The results of a tile of query rows from its pieces: the first in ``first_slot``, number i in
    the first slot of program first + i.
    """
    ROWS: gl.constexpr = FIXED.ROWS
    WIDTH: gl.constexpr = 32 * gl.num_warps()
    layout: gl.constexpr = output_layout(ROWS, 8 * gl.num_warps())
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    top = gl.full([ROWS], float("-inf"), gl.float32, rows)
    for nth in range(count):
        _, sums = _piece(results, first_slot, first, nth, FIXED, layout)
        # Past the first-level cache, which may hold what the last launch left here.
        top = gl.maximum(top, gl.load(sums, cache_modifier=".cg"))
    anchor = gl.where(top == float("-inf"), 0.0, top)
    total = gl.full([ROWS], 0.0, gl.float32, rows)
    acc0 = gl.full([ROWS, WIDTH], 0.0, gl.float32, layout)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for nth in range(count):
        outs, sums = _piece(results, first_slot, first, nth, FIXED, layout)
        weight = gl.exp2(gl.load(sums, cache_modifier=".cg") - anchor)
        total += weight
        acc0 += _weighed(outs, weight)
        acc1 += _weighed(outs + WIDTH, weight)
        if FIXED.ROW_DIM > 2 * WIDTH:
            acc2 += _weighed(outs + 2 * WIDTH, weight)
            acc3 += _weighed(outs + 3 * WIDTH, weight)
    some = total != 0
    safe = gl.where(some, total, 1.0)
    row_lse = gl.where(some, anchor + gl.log2(safe), float("-inf"))
    _finish(acc0, acc1, acc2, acc3, row_lse, 1.0 / safe, results, q_start, q_len, row_first, FIXED)


@gluon.jit
def _finish(
    acc0, acc1, acc2, acc3, row_lse, ratio, results, q_start, q_len, row_first, FIXED: gl.constexpr
):
    HEADS: gl.constexpr = FIXED.HEADS
    ROWS: gl.constexpr = acc0.shape[0]
    WIDTH: gl.constexpr = acc0.shape[1]
    layout: gl.constexpr = acc0.type.layout
    row = row_first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    real = row < q_len * HEADS
    token_at, head = (q_start + row // HEADS).to(gl.int64), row % HEADS
    if FIXED.SINKS:
        row_lse, ratio = with_sink(row_lse, ratio, results.sinks, head, real)
    if results.lse is not None:
        gl.store(results.lse + token_at * HEADS + head, row_lse * LN2, mask=real)
    channel = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    at = token_at * results.out_token + head.to(gl.int64) * results.out_head
    to = results.out + at[:, None] + channel[None, :]
    for i in gl.static_range(FIXED.ROW_DIM // WIDTH):
        acc = acc0 if i == 0 else acc1 if i == 1 else acc2 if i == 2 else acc3
        made = (acc * ratio[:, None]).to(results.out.dtype.element_ty)
        gl.store(to + i * WIDTH, made, mask=real[:, None])


@gluon.jit
def finish_empty(
    query_starts, context_lens, requests, results, window, sink_tokens, FIXED: gl.constexpr
):
    """The results of this program's requests whose mask shows no key: no program has tiles of
    theirs.
    """
    ROWS: gl.constexpr = FIXED.ROWS
    layout: gl.constexpr = output_layout(ROWS, 8 * gl.num_warps())
    for request in range(gl.program_id(0), requests, gl.num_programs(0)):
        context = gl.load(context_lens + request)
        q_start = gl.load(query_starts + request)
        new = gl.load(query_starts + request + 1) - q_start
        a_low, a_high, b_low, b_high = key_ranges(
            context, gl.minimum(new, context), window, sink_tokens, FIXED.PAGE, FIXED.FULL,
            FIXED.WINDOW, ALL_KEYS,
        )  # fmt: skip
        if (a_high <= a_low) & (b_high <= b_low):
            nothing = gl.full([ROWS, 32 * gl.num_warps()], 0.0, gl.float32, layout)
            none = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
            zero = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, layout))
            for row_first in range(0, new * FIXED.HEADS, ROWS):
                _finish(
                    nothing, nothing, nothing, nothing, none, zero, results, q_start, new,
                    row_first, FIXED,
                )  # fmt: skip
