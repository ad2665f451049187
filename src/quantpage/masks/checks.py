"""What the masks' checks share: the first offending index, and its name in an error."""

import torch
from torch import Tensor

END = 2**31 - 1
"""A bound that no position reaches: without end."""


def first_bad(bad: Tensor) -> tuple[int, ...] | None:
    """Index of the first True, None where there is none."""
    if not bool(bad.any()):
        return None
    return tuple(int(i) for i in bad.nonzero()[0])


def row_name(name: str, index: tuple[int, ...]) -> str:
    """``name[i, j, ..]``, as one would index the tensor."""
    return f"{name}[{', '.join(map(str, index))}]"


def pick(index: int, size: int, name: str) -> int:
    """``index``, or 0 where a mask has one entry for all."""
    if size == 1:
        return 0
    if not 0 <= index < size:
        raise ValueError(f"{name}: expected 0..{size - 1}, as the mask describes them, got {index}")
    return index


def check_lengths(given: tuple[int, ...] | None, batch: int, width: int) -> tuple[int, ...]:
    """Described positions of each batch row."""
    lengths = (width,) * batch if given is None else tuple(given)
    if len(lengths) != batch:
        raise ValueError(f"lengths: expected {batch}, one a batch row, got {len(lengths)}")
    for row, length in enumerate(lengths):
        if not 0 <= length <= width:
            raise ValueError(f"lengths[{row}]: expected 0..{width}, got {length}")
    return lengths


def common_sizes(left: torch.Size, right: torch.Size, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of ``dims`` where they agree or one is 1 (batch and heads)."""
    sizes = []
    for dim in dims:
        a, b = left[dim], right[dim]
        if a != b and (dim > 1 or 1 not in (a, b)):
            raise ValueError(
                f"mask: expected shapes that agree, got {tuple(left)} & {tuple(right)}"
            )
        sizes.append(max(a, b))
    return tuple(sizes)


def widened(given: tuple[int, ...] | None, batch: int) -> tuple[int, ...]:
    """``given``, an entry a batch row, or its one entry ``batch`` times."""
    assert given is not None
    return given * batch if len(given) == 1 else given
