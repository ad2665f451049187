"""All blocks of a decoder for the tokens of a step, as one call of the compiled core.

A block is four records (projections, the write, attention, the rest); the last norm may follow.
What in them does not change from step to step is packed once: all blocks work in the same buffers,
so that a step is the joining of bytes. Between two blocks nothing returns to Python.
"""

import struct
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.cpu_core import core
from quantpage.cpu_core.interface import ATTEND, FINISH, NORM, PROJECT, WRITE, Record, number
from quantpage.cpu_core.products import (
    MAX_TOKENS,
    Norm,
    Projection,
    Rotary,
    SecondHalf,
    norm_record,
    serves_norm,
)
from quantpage.cpu_core.records import CODES, layer_record, step_record

_KEPT = 16
"""Shapes of steps whose buffers are kept."""


class Block(NamedTuple):
    """One decoder block: attention with its projections, and what follows it."""

    project: Projection
    """q, k and v."""
    finish: SecondHalf
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """Of attention's scores."""
    window: int | None
    """Keys that a query sees, itself included; None: all before it."""


class _Buffers(NamedTuple):
    x: Tensor
    cos: Tensor
    sin: Tensor
    pieces: list[tuple[bytes, bytes, bytes]]
    """A block: up to the write's layer, from its step's end to attention's layer, and the end."""
    end: bytes
    """What follows the last block."""
    held: list[Tensor]


class Decoder:
    """Blocks that run in one call; every step asks ``serves`` first."""

    def __init__(self, blocks: Sequence[Block], norm: Norm | None = None) -> None:
        """norm: of what the last block makes; None: that is the result."""
        if len({each[2:5] for each in blocks}) != 1:
            raise ValueError("blocks: expected the same heads and head_dim in all of them")
        self._blocks, self._norm = list(blocks), norm
        self._tensors = [
            part for each in blocks for part in (*each.project.tensors, *each.finish.tensors)
        ]
        if norm is not None:
            self._tensors.append(norm.weight)
        # One value, so that no thread sees a half of it: addresses, and the dtype that is served.
        self._known: tuple[list[int], torch.dtype, bool] | None = None
        self._buffers: dict[tuple[object, ...], _Buffers] = {}

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the core runs all blocks in this dtype."""
        # Addresses tell in one pass whether anything changed: asking each part takes longer.
        addresses = list(map(Tensor.data_ptr, self._tensors))
        known = self._known
        if known is None or addresses != known[0] or dtype != known[1]:
            self._buffers.clear()
            served = all(
                each.project.serves(dtype) and each.finish.serves(dtype) for each in self._blocks
            ) and (self._norm is None or serves_norm(self._norm, dtype))
            known = self._known = (addresses, dtype, served)
        return known[2]

    def __call__(
        self,
        x: Float[Tensor, "tokens width"],
        cos: Float[Tensor, "tokens head_dim"],
        sin: Float[Tensor, "tokens head_dim"],
        layers: Sequence[LayerKV],
        batches: Sequence[BatchPlan],
    ) -> Float[Tensor, "tokens width"]:
        """The hidden state after the last block and the norm; keys and values are in their pages.

        batches: the same step for each block, with the page table of its pages.
        """
        buffers = self._prepared(x)
        for into, given in ((buffers.x, x), (buffers.cos, cos), (buffers.sin, sin)):
            into.copy_(given)
        blocks = []
        for (first, middle, last), layer, batch in zip(
            buffers.pieces, layers, batches, strict=True
        ):
            pages, step = layer_record(layer), step_record(batch)
            blocks.append(b"".join((first, pages, step, middle, pages, step, last)))
        blocks.append(buffers.end)
        # A call keeps its number of threads: a prompt, which takes long, may change it at a block.
        few = x.shape[0] <= MAX_TOKENS
        for program in [b"".join(blocks)] if few else blocks:
            if core().run(program, len(program), torch.get_num_threads()):
                raise RuntimeError("isa: expected one that this machine runs")
        return buffers.x.clone()

    def _prepared(self, x: Tensor) -> _Buffers:
        """Buffers of this thread for a step of this shape, and the records that name them."""
        key = (threading.get_ident(), x.shape[0], x.dtype, torch.get_num_threads())
        found = self._buffers.get(key)
        if found is None:
            found = self._build(x)
            # A prompt's length hardly comes twice: its buffers are not kept.
            if x.shape[0] <= MAX_TOKENS:
                if len(self._buffers) >= _KEPT:
                    self._buffers.clear()
                self._buffers[key] = found
        return found

    def _build(self, like: Tensor) -> _Buffers:
        tokens = like.shape[0]
        first = self._blocks[0]
        dim, heads = first.head_dim, first.q_heads
        with torch.inference_mode(False):
            x = torch.empty(like.shape, dtype=like.dtype, device="cpu")
            cos, sin = (torch.empty(tokens, dim, dtype=like.dtype, device="cpu") for _ in range(2))
            mixed = torch.empty(tokens, first.project.rows, dtype=x.dtype, device="cpu")
            q, attended = (
                torch.empty(tokens, heads * dim, dtype=x.dtype, device="cpu") for _ in range(2)
            )
        pieces = []
        for each in self._blocks:
            turned = Rotary(cos, sin, each.q_heads + each.kv_heads)
            ends = _write_end(each, mixed, q), _attend_end(each, q, attended)
            pieces.append(
                (
                    _head(PROJECT) + each.project.record(x, mixed, turned) + _head(WRITE),
                    ends[0] + _head(ATTEND),
                    ends[1] + _head(FINISH) + each.finish.record(attended, x, x),
                )
            )
        end = b"" if self._norm is None else _head(NORM) + norm_record(self._norm, x)
        return _Buffers(x, cos, sin, pieces, end, [mixed, q, attended])


def _head(record: Record) -> bytes:
    return struct.pack("=2q", number(record.name.upper()), record.size)


def _write_end(block: Block, mixed: Tensor, q_out: Tensor) -> bytes:
    """Write after layer and step; q and k come rotated and normed."""
    row, dim, at = block.project.rows, block.head_dim, mixed.data_ptr()
    k_at = at + block.q_heads * dim * mixed.itemsize
    return WRITE.pack(
        q=at,
        k=k_at,
        v=k_at + block.kv_heads * dim * mixed.itemsize,
        type=CODES[mixed.dtype],
        q_token=row,
        q_head=dim,
        k_token=row,
        k_head=dim,
        v_token=row,
        v_head=dim,
        q_out=q_out.data_ptr(),
        k_rows=0,
        v_rows=0,
        cos=0,
        sin=0,
        half_rotary=0,
        interleaved=0,
        q_norm=0,
        k_norm=0,
        norm_after=0,
        tokens=mixed.shape[0],
        q_heads=block.q_heads,
        kv_heads=block.kv_heads,
        threads=torch.get_num_threads(),
        isa=core().isa,
        eps=0.0,
    )


def _attend_end(block: Block, q: Tensor, out: Tensor) -> bytes:
    """Attend after layer and step: causal, without sinks, and nobody reads its log-sum-exp."""
    dtype, dim = CODES[q.dtype], block.head_dim
    return ATTEND.pack(
        q=q.data_ptr(),
        q_type=dtype,
        q_token=block.q_heads * dim,
        q_head=dim,
        out=out.data_ptr(),
        out_type=dtype,
        lse=0,
        sinks=0,
        starts=0,
        low=0,
        high=0,
        per_head=0,
        tokens=q.shape[0],
        q_heads=block.q_heads,
        kv_heads=block.kv_heads,
        latent=0,
        mask=number("CAUSAL"),
        window=block.window or 0,
        sink_tokens=0,
        model_basis=1,
        threads=torch.get_num_threads(),
        isa=core().isa,
        softmax_scale=block.scale,
        softcap=0.0,
    )
