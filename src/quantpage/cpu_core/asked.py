"""Python objects that are about to be looked at, asked for from memory all at once.

A decode step reads a hundred megabytes of weights and pages, after which none of the objects that
the next step asks (a thousand parts of a model, five hundred tensors) is in the processor's caches:
one after the other each costs a wait for memory, six times what looking at it takes. Asking is a
hint to the processor and touches nothing: an address that is no longer an object's does no harm.
"""

import ctypes
import sys
from array import array
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from quantpage.cpu_core import core

_LINE = 64
_KEYS = 32
"""Where CPython's dict has the address of its table; a wrong one would be a useless hint."""


class Asked:
    """Objects that are asked for together."""

    def __init__(self, parts: Iterable[Any], tables: Iterable[dict[Any, Any]]) -> None:
        """tables: dicts whose values are gone through; their values are not asked for."""
        lines: list[int] = []
        # An object's id is its address in CPython alone.
        if sys.implementation.name == "cpython":
            for table in tables:
                lines.append(id(table))
                lines += _lines(ctypes.c_uint64.from_address(id(table) + _KEYS).value, 4 * _LINE)
            for part in parts:
                lines.append(id(part))
                if type(part) in (Tensor, nn.Parameter):
                    # Behind the Python object: its sizes, and the address of its numbers.
                    lines += _lines(part._cdata, 4 * _LINE)
                    lines += _lines(part.untyped_storage()._cdata, 2 * _LINE)
        self._lines = array("Q", lines)

    def fetch(self) -> None:
        """Returns at once."""
        ask = core().fetch
        if ask is not None:
            ask(*self._lines.buffer_info())


def _lines(address: int, size: int) -> range:
    return range(address, address + size, _LINE)
