"""Packing calls for the compiled core: the records of csrc/abi.h, field by field.

Every field is 64 bits wide. What a layer or a step is told at every call is packed once, for as
long as its view lives; ``struct`` packs the rest at once. That keeps a call's Python below ten
microseconds.
"""

import struct
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages

CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.uint8: 4,
    torch.float8_e4m3fn: 5,
}
"""Storage dtype -> csrc/abi.h's Code."""
PLANED = {"int6": 6, "int3": 7}
"""The same of codes whose bits lie in planes, by name."""

_PAGES = 18
_NO_PAGES = (0,) * _PAGES
_LAYER = struct.Struct(f"={4 * _PAGES + 3}q")
_STEP = struct.Struct("=11q")
ATTEND = struct.Struct("=21q 2d")
"""What follows layer and step in the record of a call."""
WRITE = struct.Struct("=25q 1d")
GATHER = struct.Struct(f"={_PAGES}q 8q")
PROJECT = struct.Struct("=25q 1d")
FINISH = struct.Struct("=27q 1d")
LAYER_BYTES, STEP_BYTES = _LAYER.size, _STEP.size
_SHARED = LAYER_BYTES + STEP_BYTES
SIZES = (_SHARED + ATTEND.size, _SHARED + WRITE.size, GATHER.size, PROJECT.size, FINISH.size)


def pages_fields(pages: QuantizedPages) -> tuple[int, ...]:
    """Pages of csrc/abi.h. The tensors must outlive the call."""
    codes, spec = pages.codes, pages.spec
    size = codes.itemsize
    by_page, by_head, by_row, _ = codes.stride()
    code = PLANED[spec.code.name] if spec.code.fields else CODES[codes.dtype]
    head_dim = spec.code.channels(codes.shape[3])
    scale, zero = pages.scale, pages.zero
    return (
        codes.data_ptr(),
        by_page * size,
        by_head * size,
        by_row * size,
        code,
        head_dim,
        *_plane(scale, spec.dynamic),
        *_plane(zero, spec.dynamic),
        0 if scale is None else CODES[scale.dtype],
        1 if scale is None else scale.shape[-1],
        int(spec.dynamic),
        int(spec.rotation == "hadamard"),
    )


def _plane(plane: Tensor | None, dynamic: bool) -> tuple[int, int, int, int]:
    """Address and byte strides of page, head and token; a static scale may serve all heads."""
    if plane is None:
        return 0, 0, 0, 0
    size = plane.itemsize
    strides = plane.stride()
    if dynamic:
        return plane.data_ptr(), strides[0] * size, strides[1] * size, strides[2] * size
    return plane.data_ptr(), 0, strides[0] * size if plane.shape[0] > 1 else 0, 0


def float32_statics(pages: QuantizedPages) -> QuantizedPages:
    """The same pages, static scales of other dtypes as float32 (the core reads 16 and 32 bits)."""
    if pages.scale is None or pages.scale.dtype != torch.float64:
        return pages
    zero = None if pages.zero is None else pages.zero.float()
    return QuantizedPages(pages.spec, pages.codes, pages.scale.float(), zero)


def _pack_layer(layer: LayerKV) -> tuple[bytes, object]:
    halves = float32_statics(layer.key), float32_statics(layer.value)
    exact = layer.exact() if layer.exact_key is not None else None
    near = (
        2 * _NO_PAGES if exact is None else (*pages_fields(exact.key), *pages_fields(exact.value))
    )
    # Static scales that were converted live as long as the addresses; the map's, as the view.
    mapped = layer.key_map
    planes = () if mapped is None else (mapped.scale, mapped.mean, mapped.feedback)
    addresses = [0 if plane is None else plane.data_ptr() for plane in planes]
    record = _LAYER.pack(
        *pages_fields(halves[0]),
        *pages_fields(halves[1]),
        *near,
        *(addresses or (0, 0, 0)),
    )
    return record, halves


def _pack_step(batch: BatchPlan) -> tuple[bytes, object]:
    exact, page_table = batch.exact, batch.page_table
    record = _STEP.pack(
        page_table.data_ptr(),
        page_table.stride(0),
        0 if exact is None else exact.page_table.data_ptr(),
        0 if exact is None else exact.page_table.stride(0),
        batch.query_starts.data_ptr(),
        batch.context_lens.data_ptr(),
        batch.slots.data_ptr(),
        0 if exact is None else exact.slots.data_ptr(),
        batch.positions.data_ptr(),
        len(batch.query_lens),
        batch.page_size,
    )
    return record, None


class _PackedOnce:
    """``pack(view)``, kept while the view lives."""

    def __init__(self, pack: Callable[[Any], tuple[bytes, object]]) -> None:
        self._pack = pack
        self._kept: dict[int, tuple[bytes, object, object]] = {}

    def __call__(self, view: Any) -> bytes:
        """The record's part."""
        number = id(view)
        found = self._kept.get(number)
        if found is None:
            gone = weakref.ref(view, lambda _: self._kept.pop(number, None))
            found = self._kept[number] = (*self._pack(view), gone)
        return found[0]


layer_record = _PackedOnce(_pack_layer)
"""Layer of csrc/abi.h."""
step_record = _PackedOnce(_pack_step)
"""Step of csrc/abi.h."""
