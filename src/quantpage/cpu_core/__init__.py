"""The compiled CPU core: a small C++ library (csrc/) behind a plain C interface.

It knows neither Python nor PyTorch: it is given pointers, strides and sizes, so that one wheel a
platform serves every Python and every torch. Where it was not built, ``absence`` says why and
the torch implementations answer.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

# torch's wheel carries its own libgomp under the plain name; loaded first, it serves the core too,
# so that there is one pool of threads.
import torch  # noqa: F401

from quantpage.cpu_core import interface

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
"""Instruction sets that the core is compiled for, by the number that the library uses."""
LAST_FOR_ATTENTION = ISAS.index("avx512")
"""Wider ones differ in products of weights alone."""

_PATTERN = "libquantpage_cpu*"


@dataclass(frozen=True, slots=True)
class Core:
    """The library's functions; each takes one packed record and returns 0."""

    attend: Any
    write: Any
    gather: Any
    project: Any
    finish: Any
    run: Any
    """(program, bytes, threads): records in turn, each after its kind and size."""
    fetch: Any
    """(addresses, how many): asks for their lines, whatever lies there. None in older ones."""
    read: Any
    """(address, bytes, threads): reads them in order; the limit that the bench compares with."""
    isa: int
    """The widest instruction set that this machine runs, an index of ``ISAS``."""
    tiles: bool
    """Whether the machine multiplies tiles of bf16 (AMX), as torch does there and the core not."""


@lru_cache
def find_core() -> Core | None:
    """The core, None where there is none (``absence`` says why)."""
    return _open()[0]


@lru_cache
def absence() -> str:
    """Why there is no core, in a sentence; empty when there is one."""
    return _open()[1]


def loss(kind: str) -> str:
    """What whoever runs a model on a device of this kind should know; empty: nothing is lost."""
    missing = absence() if kind == "cpu" else ""
    return f"{missing} Plain torch answers, more slowly." if missing else ""


def core() -> Core:
    """The core; RuntimeError where there is none."""
    found = find_core()
    if found is None:
        raise RuntimeError(absence())
    return found


def use_library(path: str | Path) -> None:
    """Open this file from now on, instead of the one in the installation (sanitizer builds)."""
    global _chosen
    _chosen = Path(path)
    for cached in (_open, find_core, absence):
        cached.cache_clear()


_chosen: Path | None = None


@lru_cache
def _open() -> tuple[Core | None, str]:
    # An editable installation has two folders; the checkout's own is the one that is rebuilt.
    folders = [Path(__file__).parent, *map(Path, __path__)]
    found = [path for folder in folders for path in sorted(folder.glob(_PATTERN))]
    if _chosen is not None:
        found = [_chosen]
    if not found:
        return None, "no compiled core in this installation: it was made without a C++ compiler."
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"no compiled core in this installation: {error}."
    differs = _difference(library)
    if differs:
        return None, (
            f"no compiled core in this installation: {differs}; it was compiled from another "
            "version, install the package again."
        )
    library.quantpage_isa.restype = ctypes.c_int64
    isa = library.quantpage_isa()
    if isa < 0:
        return None, "no compiled core for this machine: it needs SSE4.2 on x86."
    calls = {
        name: _function(library, name, ctypes.c_char_p)
        for name in ("attend", "write", "gather", "project", "finish")
    }
    run = _function(library, "run", ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
    read = _function(library, "read", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    # A hint: a library that was compiled before there was one serves as well.
    fetch = None
    if hasattr(library, "quantpage_fetch"):
        fetch = _function(library, "fetch", ctypes.c_void_p, ctypes.c_int64)
    tiles = bool(_function(library, "tiles")())
    return Core(**calls, run=run, fetch=fetch, read=read, isa=isa, tiles=tiles), ""


def _difference(library: ctypes.CDLL) -> str:
    """Where the records of a library are not ours, in words."""
    if not hasattr(library, "quantpage_interface"):
        return "expected a library that describes its records, got one without quantpage_interface"
    library.quantpage_interface.restype = ctypes.c_char_p
    return interface.difference(library.quantpage_interface().decode())


def _function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    function = getattr(library, f"quantpage_{name}")
    function.argtypes = list(arguments)
    function.restype = ctypes.c_int64
    return function
