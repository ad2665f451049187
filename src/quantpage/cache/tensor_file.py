"""Safetensors files that are written whole and read with suspicion.

Written here rather than by the library, whose reader maps the file (cut short by somebody else it
ends the process with SIGBUS) and believes names and shapes that its caller has not seen yet:

    8 bytes      length of the header, little endian
    header       JSON: name -> dtype, shape, data_offsets; "__metadata__" -> strings
    data         the tensors, one behind the other, without gaps

The header is checked against the size of the file before anything is allocated, and the caller
looks at dtypes and shapes before a tensor is read.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quantpage.files import whole_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Safetensors' names of the dtypes that our files hold."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
_MOST_NUMBERS = 2**48
"""In a tensor: what torch can count, whatever dimensions beside a 0 there are."""


class Damaged(ValueError):
    """What a file says that cannot be; whoever reads it names the file and the error."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Byte of the data at which it begins."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An open file whose header was checked."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    """By name, in the order of the data."""
    _file: BinaryIO

    def read(self) -> dict[str, Tensor]:
        """Every tensor, in fresh memory, and the checksum compared; call it once."""
        planes = {}
        for name, entry in self.entries.items():
            plane = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
            got = self._file.readinto(_bytes(plane)) if entry.nbytes else 0  # type: ignore[attr-defined]
            if got != entry.nbytes:
                raise Damaged(
                    f"expected a whole safetensors file, got {got} of {entry.nbytes} bytes of "
                    f"{name!r}"
                )
            planes[name] = plane
        others = {name: each for name, each in self.metadata.items() if name != "checksum"}
        said, found = self.metadata.get("checksum"), checksum(others, planes)
        if said != found:
            raise Damaged(f"expected checksum {said}, got {found}: it was altered")
        return planes


@contextmanager
def open_whole(path: Path) -> Iterator[TensorFile]:
    """A file as ``write_whole`` leaves it; Damaged for any other, OSError where it cannot be read.

    Nothing is mapped: who cuts the file short meanwhile makes ``read`` raise Damaged.
    """

    def opener(name: str, flags: int) -> int:
        # A pipe is refused below, not waited for.
        return os.open(name, flags | os.O_NONBLOCK)

    with open(path, "rb", opener=opener) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise Damaged("expected a file, got a device or a pipe")
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or length > about.st_size - 8:
            raise Damaged(f"expected a whole safetensors file, got {about.st_size} bytes")
        if length > _MOST_HEADER:
            raise Damaged(f"expected a header of at most {_MOST_HEADER} bytes, got {length}")
        text = file.read(length)
        if len(text) < length:
            raise Damaged(f"expected a whole safetensors file, got {8 + len(text)} bytes")
        header = parsed(text)
        if any(re.search("[\ud800-\udfff]", each) for each in _texts(header)):
            raise Damaged("expected names and metadata of text, got half of a surrogate pair")
        metadata = header.pop("__metadata__", {})
        if type(metadata) is not dict or any(type(each) is not str for each in metadata.values()):
            raise Damaged(f"expected metadata of strings, got {shown(metadata)}")
        yield TensorFile(metadata, _entries(header, about.st_size - 8 - length), file)


def check_replaceable(path: Path, name: str, kind: str) -> None:
    """ValueError where there is a file of another ``kind``: weights and texts are not lost."""
    if not path.exists():
        return
    try:
        with open_whole(path) as file:
            found = file.metadata.get("kind")
    except Damaged:
        found = None
    if found != kind:
        raise ValueError(
            f"{name}: expected a new file or a {kind} to replace, got {path}, which is something "
            "else"
        )


def write_whole(path: Path, planes: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole and on the disk, or not at all.

    Metadata gets a ``checksum`` over everything. Links are followed and modes are as ``open``
    leaves them. Raises OSError, with ``path`` in it, and leaves what was there.
    """
    planes = {name: plane.detach().cpu().contiguous() for name, plane in planes.items()}
    # Widest first, as safetensors does: every tensor is aligned when the data are.
    order = sorted(planes, key=lambda name: (-planes[name].dtype.itemsize, name))
    header: dict[str, Any] = {
        "__metadata__": {**metadata, "checksum": checksum(metadata, planes)},
    }
    end = 0
    for name in order:
        plane, begin = planes[name], end
        end += plane.nbytes
        header[name] = {
            "dtype": _NAMES[plane.dtype],
            "shape": list(plane.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER:
        raise ValueError(
            f"{path}: expected names, shapes and notes of at most {_MOST_HEADER} bytes, got "
            f"{len(text)}"
        )
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(planes[name]))


def checksum(metadata: Mapping[str, str], planes: Mapping[str, Tensor]) -> str:
    """Of everything else in a file."""
    made = blake2b(digest_size=16)
    for name in sorted(metadata):
        made.update(f"{name}={metadata[name]}\n".encode())
    for name in sorted(planes):
        plane = planes[name]
        made.update(f"{name} {plane.dtype} {tuple(plane.shape)}\n".encode())
        made.update(_bytes(plane.contiguous()))
    return made.hexdigest()


def parsed(text: str | bytes) -> dict[str, Any]:
    """A JSON object, without a name twice; Damaged for anything else."""
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"expected JSON, got {error}") from error
    if type(found) is not dict:
        raise Damaged(f"expected a JSON object, got {shown(found)}")
    return found


def whole_number(value: object, least: int = 0, most: int = 2**31 - 1) -> bool:
    """Whether JSON gave an integer in this range."""
    return type(value) is int and least <= value <= most


def shown(value: object) -> str:
    """The beginning of what a file says, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Damaged("the same name twice")
    return found


def _texts(header: Mapping[str, Any]) -> Iterator[str]:
    """Every string that a checksum goes over."""
    yield from header
    metadata = header.get("__metadata__")
    if type(metadata) is dict:
        yield from metadata
        yield from (each for each in metadata.values() if type(each) is str)


def _entries(header: Mapping[str, Any], size: int) -> dict[str, Entry]:
    """What the header says of the data, which are ``size`` bytes."""
    found: list[tuple[int, int, str, Entry]] = []
    for name, said in header.items():
        if type(said) is not dict or set(said) != {"dtype", "shape", "data_offsets"}:
            raise Damaged(f"{shown(name)}: expected dtype, shape, data_offsets, got {shown(said)}")
        kind, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
        if type(kind) is not str or kind not in DTYPES:
            raise Damaged(f"{shown(name)}: expected a dtype of {list(DTYPES)}, got {shown(kind)}")
        if (
            type(shape) is not list
            or len(shape) > 8
            or not all(whole_number(each, 0, _MOST_NUMBERS) for each in shape)
            or math.prod(max(each, 1) for each in shape) > _MOST_NUMBERS
        ):
            raise Damaged(f"{shown(name)}: expected a shape, got {shown(shape)}")
        if (
            type(offsets) is not list
            or len(offsets) != 2
            or not all(whole_number(each, 0, size) for each in offsets)
        ):
            raise Damaged(
                f"expected a whole safetensors file, got {size} bytes of data, and {shown(name)} "
                f"at {shown(offsets)}"
            )
        entry = Entry(DTYPES[kind], tuple(shape), offsets[0])
        if offsets[1] - offsets[0] != entry.nbytes:
            raise Damaged(
                f"{shown(name)}: expected {entry.nbytes} bytes for {kind} of shape {shape}, got "
                f"offsets {offsets}"
            )
        found.append((*offsets, name, entry))
    end = 0
    for begin, after, name, _ in sorted(found, key=lambda each: each[:3]):
        if begin != end:
            raise Damaged(
                f"{shown(name)}: expected tensors without gap or overlap, got byte {begin} after "
                f"{end}"
            )
        end = after
    if end != size:
        raise Damaged(f"expected a whole safetensors file of {end} bytes of data, got {size}")
    return {name: entry for _, _, name, entry in sorted(found, key=lambda each: each[:3])}


def _bytes(plane: Tensor) -> memoryview:
    return memoryview(plane.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
