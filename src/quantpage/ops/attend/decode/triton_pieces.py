"""Rows that were cut, joined by the program that arrives last; see triton_share for who has what.

The launch of triton_cuts joins them by the same arithmetic (``join_row``).

A row's pieces lie in the workspace, normalized, each with its log2-sum-exp. Every program that
stored one counts itself in; the last one joins them. A row of more than GATHER pieces is joined
twice: first the pieces of programs that share program // GATHER, into the place of the first of
them, then those. The counter's last visitor sets it back to 0, so that the next launch, or a
replayed CUDA graph, finds it as this one did.
"""

import triton
import triton.language as tl

from quantpage.ops.triton.common import LN2, LOG2E
from quantpage.ops.triton.hadamard import hadamard


@triton.jit
def arrive(counter, wanted):
    """Whether this program is the last of ``wanted``: then it sees what all of them stored."""
    # Every warp's stores come before the one thread's release.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == wanted - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _join(
    part_out, part_lse, slot, base, count, step, row, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One query row of ``count`` pieces: the first in ``slot``, number i in 2 (base + i) step.

    The peak of their log2-sum-exps, the sum of weights against it, the weighted outputs.
    """
    channel = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    inside = channel < VALUE_DIM
    nth = tl.arange(0, PARTS)
    # A thread has all pieces of its channels: their places are constants from the turn's first one.
    apart = 2 * step * ROWS
    aside = (slot - 2 * base * step) * ROWS
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([triton.next_power_of_2(VALUE_DIM)], tl.float32)
    for first in range(0, count, PARTS):
        real = nth < count - first
        start = (2 * (base + first) * step * ROWS + row).to(tl.int64)
        at = nth * apart + tl.where(nth == 0, tl.where(first == 0, aside, 0), 0)
        mask = real[:, None] & inside[None, :]
        # Past the first-level cache, which may hold what the last launch left here.
        piece = tl.load(
            part_out + start * VALUE_DIM + (at[:, None] * VALUE_DIM + channel[None, :]), mask, 0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        own = tl.load(part_lse + start + at, real, float("-inf"), cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(own, 0))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(own - anchor)
        shrink = tl.exp2(top - anchor)
        # Select: a piece that saw nothing was not promised to be finite.
        piece = tl.where((own != float("-inf"))[:, None], piece, 0.0)
        acc = acc * shrink + tl.sum(piece * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    return top, total, acc


@triton.jit
def join_group(
    part_out, part_lse, slot, base, count, rows, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Pieces of neighbouring programs joined into the place of the first."""
    channel = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    for row in range(rows):
        top, total, acc = _join(
            part_out, part_lse, slot, base, count, 1, row, ROWS, VALUE_DIM, PARTS
        )
        safe = tl.where(total != 0, total, 1.0)
        at = slot.to(tl.int64) * ROWS + row
        # The row is read whole before its first place is written.
        tl.debug_barrier()
        tl.store(part_out + at * VALUE_DIM + channel, acc / safe, channel < VALUE_DIM)
        tl.store(part_lse + at, tl.where(total != 0, top + tl.log2(safe), float("-inf")))


@triton.jit
def join_row(
    part_out, part_lse, sinks, out, lse, slot, base, count, step, rows, row_first, kv_head, q_start,
    kv_heads, out_token, out_head, GROUP: tl.constexpr, ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr, SINKS: tl.constexpr, PARTS: tl.constexpr, begin=0, by=1,
    earlier_out=None, earlier_lse=None, TURN: tl.constexpr = 0,
):  # fmt: skip
    """The result of query rows begin, begin + by .. below ``rows`` from their pieces.

    earlier: what other keys gave. Of no piece at all: 0 and -inf, or the sink's. TURN: channels of
    a block in which values were rotated (formats/rotate), as the result is then; 0: it is not.
    """
    channel = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    for row in range(begin, rows, by):
        head = kv_head * GROUP + (row_first + row) % GROUP
        token_at = (q_start + (row_first + row) // GROUP).to(tl.int64)
        if earlier_lse is not None:
            # One more piece, asked for before the others.
            at = token_at * (kv_heads * GROUP) + head
            own = tl.load(earlier_lse + at) * LOG2E
            width = tl.where(own != float("-inf"), VALUE_DIM, 0)
            others = tl.load(earlier_out + at * VALUE_DIM + channel, channel < width, 0.0)
        top, total, acc = _join(
            part_out, part_lse, slot, base, count, step, row, ROWS, VALUE_DIM, PARTS
        )
        if earlier_lse is not None:
            new_top = tl.maximum(top, own)
            anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink, weight = tl.exp2(top - anchor), tl.exp2(own - anchor)
            acc = acc * shrink + others * weight
            total = total * shrink + weight
            top = new_top
        if SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2E
            new_top = tl.maximum(top, sink)
            shrink = tl.exp2(top - new_top)
            acc = acc * shrink
            total = total * shrink + tl.exp2(sink - new_top)
            top = new_top
        safe = tl.where(total != 0, total, 1.0)
        to = out + token_at * out_token + head.to(tl.int64) * out_head + channel
        made = acc / safe
        if TURN:
            WIDTH: tl.constexpr = triton.next_power_of_2(VALUE_DIM)
            turned = hadamard((tl.reshape(made, [1, WIDTH]),), 1, WIDTH, TURN)
            made = tl.reshape(turned[0], [WIDTH]) * (1.0 / (TURN**0.5))
        tl.store(to, made.to(out.dtype.element_ty), channel < VALUE_DIM)
        if lse is not None:
            row_lse = tl.where(total != 0, top + tl.log2(safe), float("-inf"))
            tl.store(lse + token_at * (kv_heads * GROUP) + head, row_lse * LN2)


@triton.jit
def join_cut(
    counters, part_out, part_lse, sinks, out, lse, program, row_id, first, last, slot, all_rows,
    rows, row_first, kv_head, q_start, kv_heads, out_token, out_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, SINKS: tl.constexpr,
    GATHER: tl.constexpr,
):  # fmt: skip
    """Called by each program of a cut row after its piece is stored.

    first, last: the programs that have pieces of the row; slot: the first piece's place. counters:
    one a row, then two for each GATHER programs.
    """
    many = last - first + 1 > GATHER
    if many:
        mine = program // GATHER
        begun = first // GATHER
        low = tl.maximum(first, mine * GATHER)
        count = tl.minimum(last, mine * GATHER + GATHER - 1) - low + 1
        complete = count == 1
        if count > 1:
            # Of rows with so many pieces one can begin and one can end in a group of programs.
            counter = counters + all_rows + 2 * mine + (begun == mine).to(tl.int32)
            complete = arrive(counter, count)
            if complete:
                own_slot = tl.where(low == first, slot, 2 * low)
                join_group(part_out, part_lse, own_slot, low, count, rows, ROWS, VALUE_DIM, GATHER)
        base = begun
        pieces = last // GATHER - begun + 1
        step = GATHER
    else:
        complete = True
        base = first
        pieces = last - first + 1
        step = 1
    # Nested: `and` would call both.
    if complete:  # noqa: SIM102
        if arrive(counters + row_id, pieces):
            join_row(
                part_out, part_lse, sinks, out, lse, slot, base, pieces, step, rows, row_first,
                kv_head, q_start, kv_heads, out_token, out_head, GROUP, ROWS, VALUE_DIM, SINKS,
                GATHER,
            )  # fmt: skip


@triton.jit
def finish_empty(
    request, query_starts, part_out, part_lse, sinks, out, lse, kv_heads, out_token, out_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The result of a request whose mask shows no key: no program came by."""
    q_start = tl.load(query_starts + request)
    rows = (tl.load(query_starts + request + 1) - q_start) * GROUP
    for head in range(kv_heads):
        join_row(
            part_out, part_lse, sinks, out, lse, 0, 0, 0, 1, rows, 0, head, q_start, kv_heads,
            out_token, out_head, GROUP, ROWS, VALUE_DIM, SINKS, 1,
        )  # fmt: skip
