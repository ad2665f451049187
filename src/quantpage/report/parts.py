"""Finished parts of a report, kept in a folder: an interrupted report goes on where it was.

A part is what one measurement found, in a file named by a digest of everything it depends on, and
nothing else is in its key: another format added later measures only that format.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from quantpage.files import write


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one model, device and version of QuantPage."""

    folder: Path
    common: Mapping[str, Any]
    """What every part depends on: digest of the model, dtype, device, versions."""

    def find(self, kind: str, **what: Any) -> Any:
        """What was found; None where it has to be measured, a damaged file among them."""
        path, key = self._place(kind, what)
        try:
            held = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(held, dict) or held.get("key") != key:
            return None
        return held.get("found")

    def keep(self, found: Any, kind: str, **what: Any) -> None:
        """Remember what was found, whole or not at all."""
        path, key = self._place(kind, what)
        write(path, json.dumps({"key": key, "found": found}))

    def measure(self, make: Callable[[], Any], kind: str, **what: Any) -> Any:
        """What is kept, or what ``make`` finds, which is kept."""
        found = self.find(kind, **what)
        if found is None:
            # As it will be read: tuples are lists from the first run on.
            found = json.loads(json.dumps(make()))
            self.keep(found, kind, **what)
        return found

    def _place(self, kind: str, what: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        key = json.loads(json.dumps({**self.common, "part": kind, **what}, sort_keys=True))
        name = blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=10).hexdigest()
        return self.folder / f"{kind}-{name}.json", key
