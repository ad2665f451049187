"""Keys and queries times the matrices of a key map, in a launch of its own before the write's.

Queries are done then. The write has rows of keys for a map that does nothing, and the same kernels
as without a matrix.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.formats import KeyMap, rotate
from quantpage.hardware import HOPPER, DeviceInfo, device_info
from quantpage.kept import KeptWith
from quantpage.ops.rope_write.params import WriteParams
from quantpage.ops.rope_write.reference import biased, norm_and_rope
from quantpage.ops.rows import Keys, Queries, Values

ROWS = 64
"""Of a tile of 16 bits, whatever a step has: what tensor cores of sm_90 take at once. A row's sums
are the same in every step then."""
COLUMNS, FEW_COLUMNS = 128, 64
"""Channels of them that a program makes, at most and at least."""
WIDE_ROWS, WIDE_COLUMNS = 16, 32
"""The same of float32."""
TILES, PROGRAMS = 5, 2
"""Tiles of a program, at most, and programs of a multiprocessor, before they have more than one."""


class Turned(NamedTuple):
    """What a write is left with."""

    q: Tensor | None
    """As they leave the write."""
    k: Tensor
    v: Tensor
    layer: LayerKV
    params: WriteParams


class _Factors(NamedTuple):
    """What rows of one dtype are multiplied with."""

    matrices: Tensor
    """[2, kv_heads, head_dim, head_dim], of queries, of keys, float32; for rows of 16 bits
    [2, kv_heads, 2, head_dim, head_dim]: rounded to them, and what that left."""
    offset: Tensor | None
    """float32 [kv_heads, head_dim]: what the mean of keys becomes; None: there is none."""


class _Matrices(NamedTuple):
    """Of a layer: the map as one product a row."""

    whole: Tensor
    """float32 [2, kv_heads, head_dim, head_dim]. Of queries: the scales, the turn, the rotation of
    the cache. Of keys: the scales, the turn."""
    mean: Tensor | None
    made: dict[torch.dtype, _Factors]
    """Of those that were asked for: a model's rows are of one kind."""
    rest: LayerKV
    """The layer for keys that are turned."""

    def of_rows(self, dtype: torch.dtype) -> _Factors:
        """For rows of ``dtype``."""
        if dtype not in self.made:
            self.made[dtype] = _factors(self.whole, self.mean, dtype)
        return self.made[dtype]


def _matrices_of(layer: LayerKV) -> _Matrices:
    mapped = layer.key_map
    assert mapped is not None and mapped.turn is not None and mapped.unturn is not None
    into = mapped.scale[:, :, None].double() * mapped.turn
    away = mapped.unturn.double() / mapped.scale[:, :, None]
    if layer.key.spec.rotation == "hadamard":
        away = rotate(away)
    rest = KeyMap(torch.ones_like(mapped.scale), None, mapped.feedback)
    whole = torch.stack([away, into]).float()
    return _Matrices(whole, mapped.mean, {}, replace(layer, key_map=rest))


def _factors(whole: Tensor, mean: Tensor | None, dtype: torch.dtype) -> _Factors:
    matrices, meant = whole, whole[1].double()
    if dtype != torch.float32:
        most = torch.finfo(dtype).max
        high = whole.clamp(-most, most).to(dtype)
        matrices = torch.stack([high, (whole - high.float()).to(dtype)], 2)
        meant = matrices[1].double().sum(1)
    offset = None if mean is None else (mean.double()[:, None] @ meant)[:, 0].float()
    # A kernel reads both before it waits for the launch before, which may not be what made them.
    torch.zeros(1, device=whole.device)
    return _Factors(matrices, offset)


_matrices = KeptWith(_matrices_of)


def turned_before(
    q: Queries | None, k: Keys, v: Values, layer: LayerKV, batch: BatchPlan, params: WriteParams
) -> Turned:
    """A write whose key map has a matrix as one of keys whose map has none. Keys are rounded to
    their own dtype in between.
    """
    matrices, given = _matrices(layer), k.dtype
    q, k, v = biased(q, k, v, params)
    q, k = norm_and_rope(q, k, batch, params)
    if k.dtype not in (torch.float16, torch.bfloat16) or (q is not None and q.dtype != k.dtype):
        q, k = None if q is None else q.float(), k.float()
    # Values are read beside the launch of the matrices: nothing may make them behind it.
    v = v.to(given)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    k_out = torch.empty(k.shape, dtype=given, device=k.device)
    q_out = None if q is None else torch.empty(q.shape, dtype=given, device=k.device)
    if k.shape[0]:
        _turn(q, k, q_out, k_out, matrices.of_rows(k.dtype))
    bare = replace(params, rope=None, norm=None, bias=None)
    return Turned(q_out, k_out, v, matrices.rest, bare)


def _turn(
    q: Tensor | None, k: Tensor, q_out: Tensor | None, k_out: Tensor, factors: _Factors
) -> None:
    (tokens, kv_heads, width), device = k.shape, device_info(k.device)
    q_heads = 0 if q is None else q.shape[1]
    group = q_heads // kv_heads
    halves = factors.matrices.ndim == 5
    tile = ROWS if halves else WIDE_ROWS
    tiles = triton.cdiv(tokens * max(group, 1), tile)
    # As many programs for the queries of a kv_head as it has of them, and one for its keys.
    units = q_heads + kv_heads
    columns = columns_of(tiles * kv_heads, width, halves, device)
    parts = triton.cdiv(width, columns)
    programs = triton.cdiv(tiles, max(group, 1))
    fill = programs * units * parts // (PROGRAMS * max(1, device.processors))
    programs = triton.cdiv(programs, min(TILES, max(1, fill)))
    overlap = device.since(HOPPER)
    offset = factors.offset
    first, first_out = (k, k_out) if q is None or q_out is None else (q, q_out)
    turn_kernel[(programs, units, parts)](
        first, k, first_out, k_out, factors.matrices, k if offset is None else offset,
        tokens, group, kv_heads, programs, first.stride(0), first.stride(1), k.stride(0),
        k.stride(1), HEAD_DIM=width, ROWS=tile, COLUMNS=columns, HALVES=halves,
        MEAN=offset is not None, OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
    )  # fmt: skip


def columns_of(tiles: int, width: int, halves: bool, device: DeviceInfo) -> int:
    """Few where a step has few tiles, and where a program's memory does not hold many."""
    wide = max(16, triton.next_power_of_2(width))
    found = min(COLUMNS, wide)
    if not halves:
        return min(found, WIDE_COLUMNS)
    while found > FEW_COLUMNS and (
        tiles * triton.cdiv(width, found) < device.processors
        or 4 * wide * found > device.shared_bytes // 3
    ):
        found //= 2
    return found


@triton.jit(do_not_specialize=["tokens", "group", "kv_heads", "programs"])
def turn_kernel(
    q, k, q_out, k_out, matrices, offset, tokens, group, kv_heads, programs,
    q_token, q_head, k_token, k_head,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr,
    MEAN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS rows of a kv_head: of all its queries, token by token, or of its keys.

    A program keeps COLUMNS columns of the matrix. HALVES: rows of 16 bits times both halves of it,
    which is as exact as the rows are; else three products of tf32 stand for one of float32.
    """
    unit = tl.program_id(1)
    queries = unit < group * kv_heads
    heads = tl.where(queries, group, 1)
    unit = tl.where(queries, unit, unit - group * kv_heads)
    first, tiles = tl.program_id(0) * heads + unit % heads, tl.cdiv(tokens * heads, ROWS)
    if first >= tiles:
        return
    own = (unit // heads).to(tl.int64)
    WIDE: tl.constexpr = max(16, triton.next_power_of_2(HEAD_DIM))
    SIZE: tl.constexpr = HEAD_DIM * HEAD_DIM
    channel = tl.arange(0, WIDE)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    within, made_here = channel < HEAD_DIM, column < HEAD_DIM
    number = tl.where(queries, own, kv_heads + own)
    at = matrices + number * (2 * SIZE if HALVES else SIZE) + channel[:, None] * HEAD_DIM + column
    matrix = tl.load(at, within[:, None] & made_here, 0.0)
    if HALVES:
        rest = tl.load(at + SIZE, within[:, None] & made_here, 0.0)
    if MEAN:
        off = tl.load(offset + own * HEAD_DIM + column, made_here & ~queries, 0.0)
    if queries:
        rows, out = q + own * group * q_head, q_out + own * group * HEAD_DIM
    else:
        rows, out = k + own * k_head, k_out + own * HEAD_DIM
    by_token, by_head = tl.where(queries, q_token, k_token), tl.where(queries, q_head, k_head)
    if OVERLAP:
        # Launched while the launch before ends; what that wrote is read from here on.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x, out_row, there = _tile(
        rows, first, tokens, heads, by_token, by_head, kv_heads, HEAD_DIM, WIDE, ROWS
    )
    for tile in tl.range(first, tiles, programs * heads, num_stages=1):
        # The next one comes while this one is multiplied.
        following, next_row, next_there = _tile(
            rows, tile + programs * heads, tokens, heads, by_token, by_head, kv_heads,
            HEAD_DIM, WIDE, ROWS,
        )  # fmt: skip
        if HALVES:
            made = tl.dot(x, rest, tl.dot(x, matrix))
        else:
            made = tl.dot(x, matrix, input_precision="tf32x3")
        if MEAN:
            made -= off
        to = out + out_row[:, None] + column
        tl.store(to, made.to(out.dtype.element_ty), there[:, None] & made_here)
        x, out_row, there = following, next_row, next_there


@triton.jit
def _tile(
    rows, tile, tokens, heads, by_token, by_head, kv_heads, HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a kv_head, where they go, and which of them there are."""
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = (row // heads).to(tl.int64), row % heads
    there = token < tokens
    channel = tl.arange(0, WIDE)
    at = rows + (token * by_token + head * by_head)[:, None] + channel
    x = tl.load(at, there[:, None] & (channel < HEAD_DIM), 0.0)
    return x, (token * (heads * kv_heads) + head) * HEAD_DIM, there
