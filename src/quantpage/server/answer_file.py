"""A file of answers that grows line by line and may be continued after any end.

    {"id": ..., "request": "<mark of what was asked>", "choices": [...], "usage": {...}}
    {"id": ..., "request": "...", "error": "..."}

A line is one write, so that whoever ends the process leaves at most a torn last line. ``resume``
takes that line away, and lines of errors, which are tried again.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

Id = str | int

_BEGINNING = b'{"id": '
"""Of every line: what is torn and begins otherwise was not written here, and is left alone."""


class AnswerFile:
    """The answers so far, and a place for more. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, with the file as it is, where it is no such file or is in use."""
        # Links are followed: a file is replaced where it is.
        self.path = path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            raise ValueError(f"out: expected a file, got {path}, which is something else")
        self.answered: dict[Id, str] = {}
        """Id -> the mark of what was asked, of every answer in the file."""
        self._file = self._open()
        try:
            self._content, self._kept = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def resume(self, asked: Mapping[Id, str]) -> set[Id]:
        """Make the file one of whole answers; which of ``asked`` (id -> mark) they answer.

        ValueError, with the file as it is, where an id was answered for another request.
        """
        there = asked.keys() & self.answered.keys()
        other = next(
            (each for each in asked if each in there and self.answered[each] != asked[each]), None
        )
        if other is not None:
            raise ValueError(
                f"out: expected answers to these requests, got one to another request with id "
                f"{other!r} (another prompt, parameter, model, format, page size, calibration or "
                f"dtype) in {self.path}"
            )
        if self._kept != self._content:
            self._replace(self._kept)
        return there

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; ``record`` begins with its id. OSError names the file."""
        try:
            _write(self._file, json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def _open(self) -> int:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ValueError(
                f"out: expected a file that can be written, got {self.path} ({error.strerror})"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise ValueError(
                f"out: expected a file for this process alone, got {self.path}, which another one "
                "is writing"
            ) from None
        return file

    def _read(self) -> tuple[bytes, bytes]:
        """What is there, and of it whole lines of answers, which are remembered."""
        content = self.path.read_bytes()
        *whole, rest = content.split(b"\n")
        kept = [line for at, line in enumerate(whole, 1) if self._learn(at, line)]
        if rest and _whole(rest):
            kept += [rest] if self._learn(len(whole) + 1, rest) else []
        elif rest[: len(_BEGINNING)] != _BEGINNING[: len(rest)]:
            self._refuse(len(whole) + 1, rest)
        return content, b"".join(line + b"\n" for line in kept)

    def _replace(self, wanted: bytes) -> None:
        part = self.path.with_name(f".{self.path.name}-{token_hex(8)}")
        try:
            with open(part, "xb") as file:
                file.write(wanted)
                file.flush()
                os.fchmod(file.fileno(), os.fstat(self._file).st_mode & 0o777)
                os.fsync(file.fileno())
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)
        healed = self._open()
        os.close(self._file)
        self._file = healed

    def _learn(self, number: int, line: bytes) -> bool:
        """Whether a line is an answer; it is remembered then."""
        found = _whole(line)
        if found is None:
            self._refuse(number, line)
        elif "error" not in found:
            self.answered[found["id"]] = found["request"]
            return True
        return False

    def _refuse(self, number: int, line: bytes) -> None:
        shown = line[:60].decode("utf-8", "replace")
        raise ValueError(
            f"out: expected a new file or answers of this command, got {self.path} with line "
            f"{number}: {shown!r}"
        )


def _whole(line: bytes) -> dict[str, Any] | None:
    """What a whole line of ours says; None for anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if type(found) is not dict or type(found.get("id")) not in (str, int):
        return None
    return found if type(found.get("request")) is str else None


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
