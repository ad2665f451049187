"""Products of weights with a step's tokens in the compiled core (csrc/products.h, project.cpp).

A decode step reads every weight once, so that its time is what reading them takes; torch's product
of one bf16 row reaches a third of that on a CPU without AMX. Sums are float32 whatever the types
(of int8 weights with AVX-512: exact, of activations in 16 bits, csrc/product_bytes.h; of bf16 ones
with AVX512_BF16: of activations in bf16, csrc/product_pairs.h), and the same bits for any number of
threads and of tokens beside.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.cpu_core import core
from quantpage.cpu_core.interface import FINISH, NORM, PROJECT, WEIGHT
from quantpage.cpu_core.records import CODES

MAX_TOKENS = 64
"""Of one product; with more torch's of bf16 is as fast."""
MULTIPLE = 32
"""Of what a width has to be."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def most_tokens(dtype: torch.dtype) -> int | None:
    """Of a step through whole blocks, of activations of this dtype; None: any number.

    Torch's products of many tokens are as fast as the core's, but what stands between them is not.
    """
    return MAX_TOKENS if dtype == torch.bfloat16 and core().tiles else None


class Matrix(NamedTuple):
    """What a linear layer multiplies by."""

    weight: Tensor
    """[rows, width] in the activations' dtype, or int8 with a scale."""
    scale: Tensor | None = None
    """[rows] bfloat16, of int8 rows."""
    bias: Tensor | None = None
    """[rows] in the activations' dtype."""


class Norm(NamedTuple):
    """An RMS norm."""

    weight: Tensor
    """[width] in the activations' dtype."""
    eps: float


class Rotary(NamedTuple):
    """Rotary position embedding of the first heads of a product, half-split."""

    cos: Tensor
    """[tokens, head_dim] in the activations' dtype, contiguous."""
    sin: Tensor
    heads: int
    """Heads that are turned."""


class _Packed:
    """Addresses of weights and norms, read again when a tensor's memory has moved."""

    def __init__(self, matrices: Sequence[Matrix], norm: Norm | None) -> None:
        self._matrices, self._norm = tuple(matrices), norm
        parts = [part for each in matrices for part in each if part is not None]
        self.tensors = parts if norm is None else [*parts, norm.weight]
        # One value, so that no thread sees a half of it: addresses, and the dtype that is served.
        self._known: tuple[list[int], torch.dtype, bool] | None = None
        self.norm = 0
        """Address of its weight."""
        self.weights: list[tuple[int, ...]] = []
        """Fields of WEIGHT."""
        self.eps = 0.0 if norm is None else norm.eps

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the core multiplies activations of this dtype by these."""
        addresses, known = [each.data_ptr() for each in self.tensors], self._known
        if known is None or addresses != known[0] or dtype != known[1]:
            served = all(_serves(each, self._matrices[0], dtype) for each in self._matrices) and (
                self._norm is None or serves_norm(self._norm, dtype)
            )
            if served:
                self._pack()
            known = self._known = (addresses, dtype, served)
        return known[2]

    def _pack(self) -> None:
        self.code = CODES[self._matrices[0].weight.dtype]
        self.rows = [each.weight.shape[0] for each in self._matrices]
        self.norm = 0 if self._norm is None else self._norm.weight.data_ptr()
        self.weights = []
        for each in self._matrices:
            scale = 0 if each.scale is None else each.scale.data_ptr()
            bias = 0 if each.bias is None else each.bias.data_ptr()
            self.weights.append((each.weight.data_ptr(), each.weight.shape[0], scale, bias))


def serves_norm(norm: Norm, dtype: torch.dtype) -> bool:
    """Whether the core norms activations of this dtype so."""
    return _plain(norm.weight, dtype)


def norm_record(norm: Norm, x: Tensor, isa: int | None = None) -> bytes:
    """The Norm of x, [tokens, width] contiguous, in place; both must outlive the call."""
    return NORM.pack(
        x=x.data_ptr(),
        type=CODES[x.dtype],
        tokens=x.shape[0],
        width=x.shape[1],
        weight=norm.weight.data_ptr(),
        isa=core().isa if isa is None else isa,
        eps=norm.eps,
    )


def _plain(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu"


def _serves(matrix: Matrix, first: Matrix, dtype: torch.dtype) -> bool:
    weight, scale, bias = matrix
    return (
        dtype in _DTYPES
        and weight.ndim == 2
        and weight.shape[1] % MULTIPLE == 0
        and weight.dtype == first.weight.dtype
        and _plain(weight, dtype if scale is None else torch.int8)
        and (scale is None or _plain(scale, torch.bfloat16))
        and (bias is None or _plain(bias, dtype))
    )


class Projection:
    """Up to three weights of one input, after an RMS norm and before a rotary embedding."""

    def __init__(self, matrices: Sequence[Matrix], norm: Norm | None = None) -> None:
        if not 1 <= len(matrices) <= 3:
            raise ValueError(f"matrices: expected one to three, got {len(matrices)}")
        self._packed = _Packed(matrices, norm)
        self._absent = [(0,) * len(WEIGHT.fields)] * (3 - len(matrices))

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the core multiplies activations of this dtype by these."""
        return self._packed.serves(dtype)

    @property
    def tensors(self) -> list[Tensor]:
        """What the records name: when one of them moves, records of before are stale."""
        return self._packed.tensors

    @property
    def rows(self) -> int:
        """Of all weights together."""
        return sum(self._packed.rows)

    def __call__(
        self,
        x: Float[Tensor, "tokens width"],
        rotary: Rotary | None = None,
        isa: int | None = None,
    ) -> Float[Tensor, "tokens rows"]:
        """The products' rows side by side, in x's dtype; ask ``serves(x.dtype)`` before.

        isa: an index of cpu_core.ISAS that the machine runs; None: the widest.
        """
        x = x if x.is_contiguous() else x.contiguous()
        out = x.new_empty(x.shape[0], self.rows)
        if core().project(self.record(x, out, rotary, isa)):
            raise RuntimeError(f"isa: expected one that this machine runs, got {isa}")
        return out

    def record(
        self, x: Tensor, out: Tensor, rotary: Rotary | None = None, isa: int | None = None
    ) -> bytes:
        """Its Project; the tensors must outlive the call."""
        packed = self._packed
        tokens, width = x.shape
        cos, sin, head_dim, heads = 0, 0, 0, 0
        if rotary is not None:
            cos, sin, heads = rotary[0].data_ptr(), rotary[1].data_ptr(), rotary[2]
            head_dim = rotary[0].shape[-1]
        first, second, third = packed.weights + self._absent
        return PROJECT.pack(
            x=x.data_ptr(),
            type=CODES[x.dtype],
            code=packed.code,
            tokens=tokens,
            width=width,
            norm=packed.norm,
            weights0=first,
            weights1=second,
            weights2=third,
            out=out.data_ptr(),
            cos=cos,
            sin=sin,
            head_dim=head_dim,
            rotated=heads,
            threads=torch.get_num_threads(),
            isa=core().isa if isa is None else isa,
            eps=packed.eps,
        )


class SecondHalf:
    """What follows attention in a block: y = residual + O a; y + D (silu(G norm y) * U norm y)."""

    def __init__(self, matrices: tuple[Matrix, Matrix, Matrix, Matrix], norm: Norm) -> None:
        """matrices: output, gate, up, down."""
        self._packed = _Packed(matrices, norm)

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the core multiplies activations of this dtype by these."""
        return self._packed.serves(dtype)

    @property
    def tensors(self) -> list[Tensor]:
        """What the records name: when one of them moves, records of before are stale."""
        return self._packed.tensors

    def __call__(
        self,
        attended: Float[Tensor, "tokens attended"],
        residual: Float[Tensor, "tokens width"],
        isa: int | None = None,
    ) -> Float[Tensor, "tokens width"]:
        """In the residual's dtype; both contiguous. Ask ``serves(residual.dtype)`` before."""
        out = torch.empty_like(residual)
        if core().finish(self.record(attended, residual, out, isa)):
            raise RuntimeError(f"isa: expected one that this machine runs, got {isa}")
        return out

    def record(
        self, attended: Tensor, residual: Tensor, out: Tensor, isa: int | None = None
    ) -> bytes:
        """Its Finish; ``out`` may be ``residual``. They must outlive the call."""
        packed = self._packed
        tokens, width = residual.shape
        output, gate, up, down = packed.weights
        return FINISH.pack(
            attended=attended.data_ptr(),
            residual=residual.data_ptr(),
            out=out.data_ptr(),
            type=CODES[residual.dtype],
            code=packed.code,
            tokens=tokens,
            attended_width=attended.shape[1],
            width=width,
            norm=packed.norm,
            output=output,
            gate=gate,
            up=up,
            down=down,
            threads=torch.get_num_threads(),
            isa=core().isa if isa is None else isa,
            eps=packed.eps,
        )
