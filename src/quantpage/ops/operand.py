"""One half of a layer as every kernel is given it: planes, strides, and what is compiled in.

A code is a number inside kernels (``CODE_KINDS``); how it is unpacked stands in ops/triton. Kernels
are launched with the fields that they read, so that a new code is a row of the table and an unpack.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantpage.cache.views import LayerKV, QuantizedPages

CODE_KINDS = {"none": 0, "int8": 1, "fp8": 2, "int4": 3, "int6": 4, "int3": 5}
"""A code's number inside kernels."""
NO_SCALES, A_TOKEN, STATIC, SEVERAL = 0, 1, 2, 3
"""Who owns scales: nobody, a token and kv_head (dynamic), a kv_head's channels (given); several are
a token's where its channels share them in groups (``Operand.scaled``)."""


class Operand(NamedTuple):
    """K or V of one layer; codes stand in for planes that it does not have, which nobody reads."""

    codes: Tensor
    """[pages, kv_heads, page_size, row]; e4m3 as bytes, as Triton wants them, or words."""
    scale: Tensor
    zero: Tensor
    strides: tuple[int, int]
    """Of a page and of a kv_head, in elements of ``codes``."""
    scale_strides: tuple[int, int]
    """The same of scale and zero; 0 for what is shared."""
    code: int
    """CODE_KINDS."""
    scales: int
    """NO_SCALES, A_TOKEN or STATIC."""
    has_zero: bool
    groups: int
    """Scales a row."""
    head_dim: int
    page_size: int

    @property
    def planes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales, zeros."""
        return self.codes, self.scale, self.zero

    @property
    def shared(self) -> int:
        """Channels that share a scale."""
        return self.head_dim // self.groups

    @property
    def scaled(self) -> int:
        """``scales``, but SEVERAL where a token has more than one."""
        return SEVERAL if self.scales == A_TOKEN and self.groups > 1 else self.scales


def operand(pages: QuantizedPages, unit: torch.dtype | None = None) -> Operand:
    """unit: what codes are read in, wider than a byte; None: bytes."""
    spec, codes, scale = pages.spec, pages.codes, pages.scale
    if spec.quantized and unit is not None:
        codes = codes.view(unit)
    elif codes.dtype == torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    scales, scale_strides = NO_SCALES, (0, 0)
    if scale is not None and spec.dynamic:
        scales, scale_strides = A_TOKEN, (scale.stride(0), scale.stride(1))
    elif scale is not None:
        scales, scale_strides = STATIC, (0, scale.stride(0) if scale.shape[0] > 1 else 0)
    return Operand(
        codes,
        codes if scale is None else scale,
        codes if pages.zero is None else pages.zero,
        (codes.stride(0), codes.stride(1)),
        scale_strides,
        CODE_KINDS[spec.code.name],
        scales,
        pages.zero is not None,
        1 if scale is None else scale.shape[-1],
        pages.head_dim,
        pages.page_size,
    )


def halves(layer: LayerKV) -> tuple[Operand, Operand]:
    """K and V as ``read``."""
    return read(layer.key), read(layer.value)


def read(pages: QuantizedPages) -> Operand:
    """As portable kernels read codes: bytes, but planes by the word where rows are whole words."""
    return operand(pages, torch.int32 if pages.spec.code.fields and _in_words(pages) else None)


def _in_words(pages: QuantizedPages) -> bool:
    codes = pages.codes
    whole = pages.head_dim % (4 * pages.spec.code.step) == 0
    return whole and not any(n % 4 for n in (*codes.stride()[:-1], codes.storage_offset()))


def dense_operand(rows: Tensor, keys: int, half: Operand, first_head: int = 0) -> Operand:
    """A workspace [heads, rows, head_dim] of 16-bit numbers as pages of ``keys`` keys.

    half: whose pages it was filled from, from kv_head ``first_head`` on. Where its scales are
    given, the workspace of its values holds codes, and they are multiplied where the pages'
    would be: at the end. Rounded to 16 bits, the few numbers that a channel has would be off by
    the same in every key, which no sum over keys evens out.
    """
    codes = rows.unflatten(1, (-1, keys)).transpose(0, 1)
    dense = half._replace(
        codes=codes,
        strides=(codes.stride(0), codes.stride(1)),
        code=CODE_KINDS["none"],
        page_size=keys,
    )
    if half.scales != STATIC:
        return dense._replace(scales=NO_SCALES, has_zero=False, groups=1)
    per_head = slice(first_head, None) if half.scale_strides[1] else slice(None)
    zero = half.zero[per_head] if half.has_zero else half.zero
    return dense._replace(scale=half.scale[per_head], zero=zero)


def given_values(layer: LayerKV) -> Operand | None:
    """V where its scales are given: what a workspace of its codes is multiplied by, from kv_head 0.

    None where a workspace holds numbers.
    """
    value = operand(layer.value)
    return value if value.scales == STATIC else None
