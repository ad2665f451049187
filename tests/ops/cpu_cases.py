"""Random layers and steps for the compiled core, poisoned where nobody may look."""

from dataclasses import dataclass, replace

import torch

from quantpage.batch import BatchPlan, plan_batch
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.cpu_core import LAST_FOR_ATTENTION, find_core
from quantpage.formats import KVFormat, QuantSpec, quantize, quantize_static

AVAILABLE = list(range(min(core.isa, LAST_FOR_ATTENTION) + 1)) if (core := find_core()) else []
"""Instruction sets that this machine runs, as far as they differ in attention and the write."""


@dataclass(frozen=True)
class Shape:
    """One case."""

    head_dim: int
    q_heads: int
    kv_heads: int
    page_size: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    value_dim: int | None = None


def make_pages(spec: QuantSpec, numbers: torch.Tensor, dtype: torch.dtype) -> QuantizedPages:
    """[pages, kv_heads, page_size, width] numbers as pages, page and head strides padded."""
    if not spec.quantized:
        return QuantizedPages(spec, _spread(numbers.to(dtype)))
    if spec.dynamic:
        made = quantize(numbers, spec)
        zero = None if made.zero is None else _spread(made.zero)
        return QuantizedPages(spec, _spread(made.codes), _spread(made.scale), zero)
    shape = spec.granularity.scale_shape(numbers.shape[1], numbers.shape[3])
    size = 0.3 if spec.code.name == "int4" else 0.02
    scale = (torch.rand(shape) * size + size / 2).to(spec.scale_dtype)
    zero = (torch.randn(shape) * 0.1).to(spec.scale_dtype) if spec.zero_point else None
    codes = quantize_static(numbers.transpose(1, 2), scale, zero, spec).codes.transpose(1, 2)
    return QuantizedPages(spec, _spread(codes), scale, zero)


def make_case(
    kv_format: KVFormat, shape: Shape, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, LayerKV, BatchPlan]:
    """A query, a layer and a step; slots past every context hold NaN or garbage."""
    pages = [-(-context // shape.page_size) for context in shape.context_lens]
    total = sum(pages) + 2
    order = torch.randperm(total).tolist()
    tables = []
    for count in pages:
        tables.append([order.pop() for _ in range(count)])
    size = (total, shape.kv_heads, shape.page_size)
    k = torch.randn(*size, shape.head_dim)
    v = torch.randn(*size, shape.value_dim or shape.head_dim)
    layer = LayerKV(make_pages(kv_format.key, k, dtype), make_pages(kv_format.value, v, dtype))
    exact = None
    if kv_format.exact_pages is not None:
        near_k = k + 0.1 * torch.randn_like(k)
        layer = replace(layer, exact_key=near_k.to(dtype), exact_value=v.to(dtype))
        exact = tables
    batch = plan_batch(
        shape.query_lens, shape.context_lens, tables, shape.page_size, exact_tables=exact
    )
    kept = torch.zeros(total, shape.page_size, dtype=torch.bool)
    for table, context in zip(tables, shape.context_lens, strict=True):
        for page, slots in zip(table, range(0, context, shape.page_size), strict=True):
            kept[page, : min(shape.page_size, context - slots)] = True
    poison(layer, ~kept)
    q = torch.randn(sum(shape.query_lens), shape.q_heads, shape.head_dim).to(dtype)
    return q, layer, batch


def poison(layer: LayerKV, slots: torch.Tensor) -> None:
    """NaN (or 0xff bytes) into [pages, page_size] slots of every plane."""
    for side in (layer.key, layer.value):
        planes = [side.codes]
        if side.spec.dynamic:
            planes += [plane for plane in (side.scale, side.zero) if plane is not None]
        for plane in planes:
            _fill(plane, slots)
    for plane in (layer.exact_key, layer.exact_value):
        if plane is not None:
            _fill(plane, slots)


def _fill(plane: torch.Tensor, slots: torch.Tensor) -> None:
    page, offset = slots.nonzero(as_tuple=True)
    if plane.dtype in (torch.float8_e4m3fn, torch.uint8, torch.int8):
        plane.view(torch.uint8)[page, :, offset] = 0xFF
    else:
        plane[page, :, offset] = torch.nan


def _spread(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between pages and heads, as an engine's buffers have."""
    pages, heads, *rest = x.shape
    wide = torch.empty(pages, heads + 1, *rest, dtype=x.dtype)
    wide[:, :heads] = x
    return wide[:, :heads]
