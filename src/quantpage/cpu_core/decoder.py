"""All blocks of a decoder for a few tokens, as one call of the compiled core.

A block is four records (projections, the write, attention, the rest). What in them does not change
from step to step is packed once: all blocks work in the same buffers, so that a step is the joining
of bytes. Between two blocks nothing returns to Python.
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
from quantpage.cpu_core.products import Projection, Rotary, SecondHalf
from quantpage.cpu_core.records import (
    ATTEND,
    CODES,
    FINISH,
    LAYER_BYTES,
    PROJECT,
    STEP_BYTES,
    WRITE,
    layer_record,
    step_record,
)

_KINDS = {"project": 0, "write": 1, "attend": 2, "finish": 3}
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
    held: list[Tensor]


class Decoder:
    """Blocks that run in one call; every step asks ``serves`` first."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        if len({each[2:5] for each in blocks}) != 1:
            raise ValueError("blocks: expected the same heads and head_dim in all of them")
        self._blocks = list(blocks)
        self._tensors = [
            part for each in blocks for part in (*each.project.tensors, *each.finish.tensors)
        ]
        # One value, so that no thread sees a half of it: addresses, and the dtype that is served.
        self._known: tuple[list[int], torch.dtype, bool] | None = None
        self._buffers: dict[tuple[object, ...], _Buffers] = {}

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the core runs all blocks in this dtype."""
        # One look at all of them: a step has no time to ask each.
        addresses = [each.data_ptr() for each in self._tensors]
        known = self._known
        if known is None or addresses != known[0] or dtype != known[1]:
            self._buffers.clear()
            served = all(
                each.project.serves(dtype) and each.finish.serves(dtype) for each in self._blocks
            )
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
        """The hidden state after the last block; keys and values are in their pages.

        batches: the same step for each block, with the page table of its pages.
        """
        buffers = self._prepared(x)
        for into, given in ((buffers.x, x), (buffers.cos, cos), (buffers.sin, sin)):
            into.copy_(given)
        parts = []
        for (first, middle, last), layer, batch in zip(
            buffers.pieces, layers, batches, strict=True
        ):
            pages, step = layer_record(layer), step_record(batch)
            parts += [first, pages, step, middle, pages, step, last]
        program = b"".join(parts)
        if core().run(program, len(program)):
            raise RuntimeError("isa: expected one that this machine runs")
        return buffers.x.clone()

    def _prepared(self, x: Tensor) -> _Buffers:
        """Buffers of this thread for a step of this shape, and the records that name them."""
        key = (threading.get_ident(), x.shape[0], x.dtype, torch.get_num_threads())
        found = self._buffers.get(key)
        if found is None:
            if len(self._buffers) >= _KEPT:
                self._buffers.clear()
            found = self._buffers[key] = self._build(x)
        return found

    def _build(self, like: Tensor) -> _Buffers:
        tokens = like.shape[0]
        first = self._blocks[0]
        dim, heads = first.head_dim, first.q_heads
        with torch.inference_mode(False):
            x = torch.empty(like.shape, dtype=like.dtype)
            cos, sin = (torch.empty(tokens, dim, dtype=like.dtype) for _ in range(2))
            mixed = torch.empty(tokens, first.project.rows, dtype=x.dtype)
            q, attended = (torch.empty(tokens, heads * dim, dtype=x.dtype) for _ in range(2))
            lse = torch.empty(tokens, heads)
        pieces = []
        for each in self._blocks:
            turned = Rotary(cos, sin, each.q_heads + each.kv_heads)
            ends = _write_end(each, mixed, q), _attend_end(each, q, attended, lse)
            pieces.append(
                (
                    _head("project", PROJECT.size)
                    + each.project.record(x, mixed, turned)
                    + _head("write", LAYER_BYTES + STEP_BYTES + WRITE.size),
                    ends[0] + _head("attend", LAYER_BYTES + STEP_BYTES + ATTEND.size),
                    ends[1] + _head("finish", FINISH.size) + each.finish.record(attended, x, x),
                )
            )
        return _Buffers(x, cos, sin, pieces, [mixed, q, attended, lse])


def _head(kind: str, size: int) -> bytes:
    return struct.pack("=2q", _KINDS[kind], size)


def _write_end(block: Block, mixed: Tensor, q_out: Tensor) -> bytes:
    """Write of csrc/abi.h after layer and step; q and k come rotated."""
    row, dim, at = block.project.rows, block.head_dim, mixed.data_ptr()
    k_at = at + block.q_heads * dim * mixed.itemsize
    v_at = k_at + block.kv_heads * dim * mixed.itemsize
    strides = (row, dim) * 3
    no_rope, no_norm = (0, 0, 0, 0), (0, 0, 0)
    return WRITE.pack(
        *(at, k_at, v_at),
        CODES[mixed.dtype],
        *strides,
        *(q_out.data_ptr(), 0, 0),
        *no_rope,
        *no_norm,
        mixed.shape[0],
        block.q_heads,
        block.kv_heads,
        torch.get_num_threads(),
        core().isa,
        0.0,
    )


def _attend_end(block: Block, q: Tensor, out: Tensor, lse: Tensor) -> bytes:
    """Attend of csrc/abi.h after layer and step: causal, without sinks."""
    dtype, dim = CODES[q.dtype], block.head_dim
    no_sinks, no_intervals, causal, no_sink_tokens = 0, (0, 0, 0, 0), 0, 0
    return ATTEND.pack(
        *(q.data_ptr(), dtype, block.q_heads * dim, dim),
        *(out.data_ptr(), dtype, lse.data_ptr()),
        no_sinks,
        *no_intervals,
        q.shape[0],
        block.q_heads,
        block.kv_heads,
        causal,
        block.window or 0,
        no_sink_tokens,
        1,
        torch.get_num_threads(),
        core().isa,
        block.scale,
        0.0,
    )
