"""Sixteen channels of rows that are rounded in turn, and what they say to those before them.

In steps of the scale, with u a row before anything is rounded and U unit lower triangular,

    wanted_i = u_i + sum_{j > i} e_j (-U_ji)      c_i = clip(rint(wanted_i))      e_i = c_i - u_i

A thread has a row and rounds a block's channels one after the other in registers. What the block
says to all before it is one product of the tensor cores: errors in a high and a low half of 16
bits, U as it is (``with_feedback`` makes it of 16 bits).
"""

# Kernels grow tuples by +: the compiler knows no unpacking, and each length is a type of its own.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from quantpage.ops.triton.codes import largest, smallest
from quantpage.ops.triton.common import INTERPRETED, STATIC, Constant

BLOCK = Constant(16)
"""Channels that are rounded between two products; divides every head_dim that is served."""
_ROUND = Constant(12582912.0)


@triton.jit
def of_block(rows, block, turn, ROWS: tl.constexpr):
    """A block's channels of the rows."""
    found = ()
    for i in tl.static_range(BLOCK):
        found = found + (tl.load(rows + (block * BLOCK + i) * ROWS + turn),)
    return found


@triton.jit
def round_block(
    block, heard, given, rows, code_rows, to, slot, coupling, scale, zero, kv_head, turn, inverse,
    shift, loss, CODE: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    MEASURED: tl.constexpr, DIRECT: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """Round block number ``block`` of the rows, the last first.

    heard: what later blocks say to this one, to the one before it, ..: [ALL, BLOCK] each. given:
    ``of_block`` of it. Codes go to pages, ``to``, where DIRECT, else to ``code_rows``, both [ALL].
    Hands back what the blocks before it have heard then, ``of_block`` of the next, and the loss,
    which is added up where MEASURED.
    """
    QMAX: tl.constexpr = largest(CODE)
    LOW: tl.constexpr = smallest(CODE) if ZERO else -QMAX
    BLOCKS: tl.constexpr = HEAD_DIM // BLOCK
    WIDE: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    begin = block * BLOCK
    within = tl.arange(0, BLOCK)
    # What comes from far is asked for before it is needed: nothing overtakes a barrier, and there
    # is one wherever numbers change hands.
    own = coupling.within + (kv_head * BLOCKS + block) * (BLOCK * BLOCK)
    at = (kv_head * BLOCKS + block) * (BLOCK * WIDE)
    at += within[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    factors = tl.load(coupling.between + at)
    ahead = of_block(rows, tl.maximum(block - 1, 0), turn, ROWS)
    said = _columns(heard[0], ALL)
    numbers = given
    given = ()
    wanted = ()
    for i in tl.static_range(BLOCK):
        y = numbers[i]
        if SCALES == STATIC:
            owner = (begin + i) // SHARED
            if ZERO:
                y -= tl.load(zero + owner).to(tl.float32)
            y = tl.math.div_rn(y, y * 0.0 + tl.load(scale + owner).to(tl.float32))
        elif ZERO:
            y = y * inverse + shift
        else:
            y = y * inverse
        given = given + (y,)
        wanted = wanted + (y + said[i],)
    made = ()
    errors = ()
    for i in tl.static_range(BLOCK - 1, -1, -1):
        held = tl.minimum(tl.maximum(wanted[i] + _ROUND, LOW + _ROUND), QMAX + _ROUND)
        code = held - _ROUND
        error = code - given[i]
        by = _numbers(own, i * BLOCK, i + MEASURED)
        if MEASURED:
            off = code - wanted[i]
            loss += by[i] * off * off
        made = (code,) + made
        errors = (error,) + errors
        left = ()
        for j in tl.static_range(i):
            left = left + (wanted[j] + error * by[j],)
        wanted = left
    whole = _rows(made, ALL)
    if DIRECT:
        tl.store(to[:, None] + begin + within[None, :], whole.to(tl.int8), (slot >= 0)[:, None])
    else:
        tl.store(code_rows[:, None] + begin + within[None, :], whole.to(tl.int8))
    error = _rows(errors, ALL)
    high = error.to(tl.float16)
    low = (error - high.to(tl.float32)).to(tl.float16)
    left = ()
    for i in tl.static_range(len(heard) - 1):
        left = left + (heard[i + 1],)
    left = left + (tl.zeros([ALL, BLOCK], tl.float32),)
    sums = _joined(left, ALL, WIDE)
    sums = tl.dot(low, factors, tl.dot(high, factors, sums))
    if SCALES == STATIC:
        sums = tl.dot(high, tl.load(coupling.rest + at), sums)
    told = _blocks_of(sums, ALL, WIDE)
    return told, ahead, loss


@triton.constexpr_function
def _four(first):
    return f"ld.global.nc.v4.f32 {{$0, $1, $2, $3}}, [$4 + {4 * first}];"


@triton.jit
def _numbers(at, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT float32 from number FIRST on, every thread all of them; both are 16 bytes aligned."""
    found = ()
    if INTERPRETED:
        for i in tl.static_range(COUNT):
            found = found + (tl.load(at + FIRST + i),)
    else:
        for i in tl.static_range((COUNT + 3) // 4):
            found = found + tl.inline_asm_elementwise(
                _four(FIRST + 4 * i), "=f,=f,=f,=f,l", [at.to(tl.int64)],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
            )  # fmt: skip
    return found


@triton.constexpr_function
def _halvings(wide):
    return (wide // BLOCK.value).bit_length() - 1


@triton.jit
def _blocks_of(x, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """[ROWS, WIDE] as blocks of sixteen columns."""
    parts = (x,)
    for level in tl.static_range(_halvings(WIDE)):
        halves = ()
        for i in tl.static_range(len(parts)):
            one, two = tl.split(
                tl.permute(tl.reshape(parts[i], [ROWS, 2, WIDE >> (level + 1)]), [0, 2, 1])
            )
            halves = halves + (one, two)
        parts = halves
    return parts


@triton.jit
def _joined(parts, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """``_blocks_of`` undone."""
    for level in tl.static_range(_halvings(WIDE)):
        pairs = ()
        for i in tl.static_range(len(parts) // 2):
            both = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), [0, 2, 1])
            pairs = pairs + (tl.reshape(both, [ROWS, (2 << level) * BLOCK]),)
        parts = pairs
    return parts[0]


@triton.jit
def _columns(x, ROWS: tl.constexpr):
    """[ROWS, 16] as sixteen columns, each a thread's own."""
    columns = (x,)
    for level in tl.static_range(4):
        even = ()
        odd = ()
        for i in tl.static_range(len(columns)):
            if level < 3:
                one, two = tl.split(tl.reshape(columns[i], [ROWS, 8 >> level, 2]))
            else:
                one, two = tl.split(columns[i])
            even = even + (one,)
            odd = odd + (two,)
        columns = even + odd
    return columns


@triton.jit
def _rows(columns, ROWS: tl.constexpr):
    """Sixteen columns as [ROWS, 16]: ``_columns`` undone."""
    for _ in tl.static_range(4):
        pairs = ()
        for i in tl.static_range(len(columns) // 2):
            pairs = pairs + (tl.join(columns[i], columns[i + len(columns) // 2]),)
        columns = pairs
    return tl.reshape(columns[0], [ROWS, 16])
