"""Keys and queries times the matrices of a key map, in a launch of its own before the write's.

The write then has rows of a map that does nothing, and the same kernels as without a matrix.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.formats import KeyMap
from quantpage.hardware import HOPPER, device_info
from quantpage.kept import KeptWith
from quantpage.ops.rope_write.params import WriteParams
from quantpage.ops.rope_write.reference import biased, norm_and_rope
from quantpage.ops.rows import Keys, Queries, Values


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program makes."""

    rows: int
    """Tokens of one head."""
    columns: int
    """Channels that it makes, at most."""
    chunk: int
    """Channels that it multiplies by at a time, at most."""
    warps: int


FEW, MANY = Tile(16, 64, 128, 4), Tile(64, 128, 64, 4)
FEW_TOKENS = 256
"""Up to so many a tile is FEW."""


class Turned(NamedTuple):
    """What a write is left with."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    layer: LayerKV
    params: WriteParams


class _Matrices(NamedTuple):
    """Of a layer: the map as one product a row."""

    into: Tensor
    """float32 [kv_heads, head_dim, head_dim]: scales, then the turn."""
    away: Tensor
    """The same of queries."""
    halves: dict[torch.dtype, tuple[Tensor, Tensor]]
    """Both as [kv_heads, 2, head_dim, head_dim] for rows of 16 bits: rounded to them, and what that
    left. Of those that were asked for: a model's rows are of one kind."""
    rest: LayerKV
    """The layer for rows that are turned."""

    def of_rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of keys and of queries, for rows of ``dtype``."""
        if dtype not in (torch.float16, torch.bfloat16):
            return self.into, self.away
        if dtype not in self.halves:
            self.halves[dtype] = _in_halves(self.into, dtype), _in_halves(self.away, dtype)
        return self.halves[dtype]


def _matrices_of(layer: LayerKV) -> _Matrices:
    mapped = layer.key_map
    assert mapped is not None and mapped.turn is not None and mapped.unturn is not None
    into = (mapped.scale[:, :, None] * mapped.turn).contiguous()
    away = (mapped.unturn / mapped.scale[:, :, None]).contiguous()
    rest = KeyMap(torch.ones_like(mapped.scale), None, mapped.feedback)
    return _Matrices(into, away, {}, replace(layer, key_map=rest))


def _in_halves(x: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    high = x.clamp(-most, most).to(dtype)
    return torch.stack([high, (x - high.float()).to(dtype)], 1).contiguous()


_matrices = KeptWith(_matrices_of)


def turned_before(
    q: Queries | None, k: Keys, v: Values, layer: LayerKV, batch: BatchPlan, params: WriteParams,
    tile: Tile | None = None,
) -> Turned:  # fmt: skip
    """A write whose key map has a matrix as one whose map has none. Rows are rounded to their own
    dtype in between. tile: None for FEW or MANY.
    """
    mapped = layer.key_map
    assert mapped is not None
    matrices, given = _matrices(layer), k.dtype
    q, k, v = biased(q, k, v, params)
    q, k = norm_and_rope(q, k, batch, params)
    k = k if k.stride(-1) == 1 else k.contiguous()
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    alike = q is None or q.dtype == k.dtype
    into, away = matrices.of_rows(k.dtype if alike else torch.float32)
    tokens, kv_heads, width = k.shape
    q_heads = 0 if q is None else q.shape[1]
    k_out = torch.empty(k.shape, dtype=given, device=k.device)
    q_out = None if q is None else torch.empty(q.shape, dtype=given, device=k.device)
    if tile is None:
        tile = FEW if tokens <= FEW_TOKENS else MANY
    wide = max(16, triton.next_power_of_2(width))
    columns = min(tile.columns, wide)
    overlap = device_info(k.device).since(HOPPER)
    first, first_out = (k, k_out) if q is None or q_out is None else (q, q_out)
    if tokens:
        turn_kernel[
            (triton.cdiv(tokens, tile.rows), q_heads + kv_heads, triton.cdiv(width, columns))
        ](
            first, k, first_out, k_out, into, away, k if mapped.mean is None else mapped.mean,
            tokens, q_heads, kv_heads, first.stride(0), first.stride(1), k.stride(0), k.stride(1),
            HEAD_DIM=width, ROWS=tile.rows, COLUMNS=columns, CHUNK=min(tile.chunk, wide),
            HALVES=into.ndim == 4, MEAN=mapped.mean is not None, OVERLAP=overlap,
            launch_pdl=overlap, num_warps=tile.warps,
        )  # fmt: skip
    bare = replace(params, rope=None, norm=None, bias=None)
    return Turned(q_out, k_out, v.to(given), matrices.rest, bare)


@triton.jit
def turn_kernel(
    q, k, q_out, k_out, into, away, mean, tokens, q_heads, kv_heads,
    q_token, q_head, k_token, k_head,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    HALVES: tl.constexpr, MEAN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS tokens of one head: queries first, then keys."""
    if OVERLAP:
        # Launched while the launch before ends; what that wrote is read from here on.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    SIZE: tl.constexpr = (2 if HALVES else 1) * HEAD_DIM * HEAD_DIM
    if head < q_heads:
        own = head // (q_heads // kv_heads)
        _turn(
            q + head * q_head, q_token, q_out + head * HEAD_DIM, q_heads * HEAD_DIM,
            away + own * SIZE, mean, token, tokens, HEAD_DIM, ROWS, COLUMNS, CHUNK, HALVES, False,
        )  # fmt: skip
    else:
        own = head - q_heads
        _turn(
            k + own * k_head, k_token, k_out + own * HEAD_DIM, kv_heads * HEAD_DIM,
            into + own * SIZE, mean + own * HEAD_DIM, token, tokens,
            HEAD_DIM, ROWS, COLUMNS, CHUNK, HALVES, MEAN,
        )  # fmt: skip


@triton.jit
def _turn(
    rows, stride, out, out_stride, matrix, mean, token, tokens,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    HALVES: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """HALVES: rows of 16 bits, about their mean, times both halves of a matrix, which is as exact
    as the rows are; else three products of tf32 stand for one of float32.
    """
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    there = (token < tokens)[:, None]
    made = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.static_range(0, HEAD_DIM, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        within = channel < HEAD_DIM
        x = tl.load(rows + token[:, None] * stride + channel, there & within, 0.0)
        if MEAN:
            about = x.to(tl.float32) - tl.load(mean + channel, within, 0.0)
            x = about.to(x.dtype) if HALVES else about
        at = matrix + channel[:, None] * HEAD_DIM + column
        inside = within[:, None] & (column < HEAD_DIM)
        m = tl.load(at, inside, 0.0)
        if HALVES:
            made = tl.dot(x, m, made)
            made = tl.dot(x, tl.load(at + HEAD_DIM * HEAD_DIM, inside, 0.0), made)
        else:
            made = tl.dot(x.to(tl.float32), m, made, input_precision="tf32x3")
    to = out + token[:, None] * out_stride + column
    tl.store(to, made.to(out.dtype.element_ty), there & (column < HEAD_DIM))
