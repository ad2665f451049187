"""Files that commands write: asked for before anything takes long, there whole or not at all."""

import os
from pathlib import Path


def check_writable(path: Path | None, name: str) -> None:
    """ValueError where a file could not be written; asked before anything that takes long."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{name}: expected a file to write, got the folder {path}")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    target = path if path.exists() else parent
    if not parent.is_dir() or not os.access(target, os.W_OK):
        raise ValueError(f"{name}: expected a file that can be written, got {path}")


def write(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, content.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
