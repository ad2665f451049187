"""Files that commands write: asked for before anything takes long, there whole or not at all."""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO


def check_writable(
    path: Path | None,
    name: str,
    beside: Mapping[str, Path | None] | None = None,
    in_place: bool = False,
) -> None:
    """ValueError where a file could not be written; asked before anything that takes long.

    beside: other files of the command, by the names of their arguments: what it reads, or writes
    too, is not replaced. in_place: what is there grows, and is not replaced.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name}: expected a file to write, got the folder {path}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name}: expected a file to write, got {path}, a device or pipe")
    for other, its in (beside or {}).items():
        if its is not None and os.path.realpath(its) == os.path.realpath(path):
            raise ValueError(f"{name}: expected another file than {other}, got {path} for both")
    parent = Path(os.path.realpath(path)).parent
    while not parent.exists():
        parent = parent.parent
    try:
        if path.exists():
            os.close(os.open(path, os.O_WRONLY))
        if not (in_place and path.exists()):
            # Tried, as whole_file does: a mode tells root nothing, and of no file system that is
            # full or takes no files.
            trial = parent / f".quantpage-{token_hex(8)}"
            trial.touch(exist_ok=False)
            trial.unlink()
    except OSError as error:
        raise ValueError(
            f"{name}: expected a file that can be written, got {path} ({error.strerror})"
        ) from error


def write(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is on the disk under its name when the block has ended, or not at all.

    Two that write one at once do not meet: the last is there. Folders that are missing are made,
    links are followed and modes are as ``open`` leaves them. Raises OSError, with ``path`` in it,
    and leaves what was there, whatever ends the block.
    """
    target = Path(os.path.realpath(path))
    part = target.parent / f".quantpage-{token_hex(8)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode(target)
        with open(part, "xb") as file:
            yield file
            file.flush()
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        # Not there any more, or never there; the error that is under way tells more.
        with suppress(OSError):
            part.unlink()


def _mode(target: Path) -> int | None:
    """Of the file that is replaced; None: there is none."""
    try:
        about = os.stat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(about.st_mode):
        raise OSError(0, "a folder, device or pipe in its place", str(target))
    return stat.S_IMODE(about.st_mode)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
