"""Packing calls for the compiled core: the records of csrc/abi.h, field by field.

Every field is 64 bits wide. ``struct`` packs a whole call at once, which is what keeps a step's
Python below ten microseconds.
"""

import struct

import torch
from torch import Tensor

from quantpage.cache.views import QuantizedPages

CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.uint8: 4,
    torch.float8_e4m3fn: 5,
}
"""Storage dtype -> csrc/abi.h's Code."""

_PAGES = 18
ATTEND = struct.Struct(f"={2 * _PAGES}q 27q 2d")
WRITE = struct.Struct(f"={4 * _PAGES}q 29q 1d")
GATHER = struct.Struct(f"={_PAGES}q 8q")
SIZES = (ATTEND.size, WRITE.size, GATHER.size)
NO_PAGES = (0,) * _PAGES


def pages_fields(pages: QuantizedPages) -> tuple[int, ...]:
    """Pages of csrc/abi.h. The tensors must outlive the call."""
    codes, spec = pages.codes, pages.spec
    size = codes.itemsize
    by_page, by_head, by_row, _ = codes.stride()
    code = CODES[codes.dtype]
    head_dim = codes.shape[3] * spec.code.values_per_byte
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
