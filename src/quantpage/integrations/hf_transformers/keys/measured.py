"""What a calibration has measured so far, in a file that an interrupted one goes on from.

tensors      <layer>.<field of KeyStatistics>; with ranges <layer>.key.<field of ChannelRanges>
             and <layer>.value.<...>
metadata     kind, version, mark (of model and texts), texts and tokens (counts, JSON), checksum
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from pathlib import Path

from torch import Tensor, nn

from quantpage.cache.tensor_file import Damaged, open_whole, write_whole
from quantpage.formats.channel_ranges import ChannelRanges
from quantpage.formats.key_statistics import KeyStatistics
from quantpage.integrations.hf_transformers.keys.statistics import Placed
from quantpage.integrations.hf_transformers.modules.digest import model_digest

KIND = "quantpage measurement"
VERSION = "5"
SECONDS = 20.0
"""Between two writings."""
_MOMENTS = tuple(each.name for each in fields(KeyStatistics) if each.name != "tokens")
_RANGES = tuple(each.name for each in fields(ChannelRanges))


@dataclass(slots=True)
class Measured:
    """Statistics of layers, and of how many texts."""

    keys: dict[int, KeyStatistics] = field(default_factory=dict)
    ranges: dict[int, tuple[ChannelRanges, ChannelRanges]] = field(default_factory=dict)
    """Of keys and of values, where a static format wants them."""
    texts: int = 0

    def save(self, path: Path, mark: str) -> None:
        """Write a file, whole or not at all."""
        planes: dict[str, Tensor] = {}
        for index, each in self.keys.items():
            planes |= {f"{index}.{name}": getattr(each, name) for name in _MOMENTS}
        for index, pair in self.ranges.items():
            for half, one in zip(("key", "value"), pair, strict=True):
                planes |= {f"{index}.{half}.{name}": getattr(one, name) for name in _RANGES}
        metadata = {"kind": KIND, "version": VERSION, "mark": mark, "texts": str(self.texts)}
        metadata["tokens"] = json.dumps({index: each.tokens for index, each in self.keys.items()})
        write_whole(path, planes, metadata)

    @classmethod
    def load(cls, path: Path, mark: str) -> "Measured | None":
        """What ``save`` wrote under this mark; None: there is nothing of the kind."""
        try:
            with open_whole(path) as file:
                about = file.metadata
                if (about.get("kind"), about.get("version")) != (KIND, VERSION):
                    return None
                if about.get("mark") != mark:
                    return None
                planes = file.read()
        except (Damaged, FileNotFoundError):
            return None
        made = cls(texts=int(about["texts"]))
        for name, tokens in json.loads(about["tokens"]).items():
            moments = {each: planes[f"{name}.{each}"] for each in _MOMENTS}
            made.keys[int(name)] = KeyStatistics(tokens, **moments)
            if f"{name}.key.low" in planes:
                key, value = (
                    ChannelRanges(**{each: planes[f"{name}.{half}.{each}"] for each in _RANGES})
                    for half in ("key", "value")
                )
                made.ranges[int(name)] = (key, value)
        return made

    def left(self, texts: Sequence[Placed], path: Path, mark: str) -> Iterator[Placed]:
        """The texts that are not counted yet, for ``measure``, which asks for the next when it has
        added the one before; ``path`` is written now and then.
        """
        written = time.monotonic()
        for each in texts[self.texts :]:
            yield each
            self.texts += 1
            if time.monotonic() - written >= SECONDS and self.texts < len(texts):
                self.save(path, mark)
                written = time.monotonic()


def mark_of(model: nn.Module, texts: Sequence[Placed], ranges: bool) -> str:
    """Of what decides a measurement: every weight, its dtype, the configuration, the texts and
    where they are placed.
    """
    made = blake2b(f"{model_digest(model)} {ranges}\n".encode(), digest_size=16)
    for each in texts:
        made.update(f"{each.first} {each.tokens.tolist()}\n".encode())
    return made.hexdigest()
