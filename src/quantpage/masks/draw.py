"""A mask as a picture: on the terminal and as a PNG.

Queries go down, keys go right. A tile (what a kernel works on at a time) is coloured by what
becomes of it: full tiles run without mask code, partial ones with it, skipped ones are not read.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

COLOURS = {
    "full": ((44, 123, 182), (44, 123, 182)),
    "partial": ((253, 174, 97), (254, 236, 211)),
    "skipped": ((240, 240, 240), (240, 240, 240)),
}
"""Colour of a visible and of a hidden pair, by what its tile is."""

_LINE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Picture:
    """A materialized mask cut in tiles; ``print`` it, or ``save`` it."""

    seen: Bool[Tensor, "queries keys"]
    query_tile: int
    key_tile: int

    def __post_init__(self) -> None:
        if self.query_tile < 1 or self.key_tile < 1:
            raise ValueError(
                f"tile: expected at least (1, 1), got ({self.query_tile}, {self.key_tile})"
            )

    def tiles(self) -> list[list[str]]:
        """'full', 'partial' or 'skipped' of each tile."""
        rows = self.seen.split(self.query_tile)
        return [[_name(tile) for tile in row.split(self.key_tile, dim=1)] for row in rows]

    def counts(self) -> dict[str, int]:
        """Tiles of each sort."""
        flat = [name for row in self.tiles() for name in row]
        return {name: flat.count(name) for name in COLOURS}

    def __str__(self) -> str:
        """A character a pair: '#' in a full tile, '+' and '-' in a partial one, '.' skipped."""
        glyphs = {"full": "##", "partial": "-+", "skipped": ".."}
        lines = []
        for row, names in enumerate(self.tiles()):
            block = self.seen[row * self.query_tile : (row + 1) * self.query_tile]
            for line in block.tolist():
                lines.append(
                    "".join(
                        glyphs[names[key // self.key_tile]][int(pair)]
                        for key, pair in enumerate(line)
                    )
                )
        found = self.counts()
        lines.append(" ".join(f"{name} {count}" for name, count in found.items()))
        return "\n".join(lines)

    def pixels(self, cell: int = 6) -> UInt8[Tensor, "height width 3"]:
        """``cell`` pixels a pair and a line around each tile."""
        queries, keys = self.seen.shape
        names = list(COLOURS)
        table = torch.tensor([COLOURS[name] for name in names], dtype=torch.uint8, device="cpu")
        kinds = torch.tensor(
            [[names.index(name) for name in row] for row in self.tiles()], device="cpu"
        )
        kinds = kinds.repeat_interleave(self.query_tile, 0)[:queries]
        kinds = kinds.repeat_interleave(self.key_tile, 1)[:, :keys]
        image = table[kinds, (~self.seen).long().cpu()]
        image = image.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        line = torch.tensor(_LINE, dtype=torch.uint8, device="cpu")
        image[:: self.query_tile * cell] = line
        image[:, :: self.key_tile * cell] = line
        return image

    def save(self, path: str | Path, cell: int = 6) -> Path:
        """Write a PNG and say where."""
        path = Path(path)
        path.write_bytes(_png(self.pixels(cell)))
        return path


def _name(tile: Tensor) -> str:
    if bool(tile.all()):
        return "full"
    return "partial" if bool(tile.any()) else "skipped"


def _png(image: Tensor) -> bytes:
    """An 8-bit RGB PNG, by hand: three chunks need no library."""
    height, width, _ = image.shape
    raw = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in chunks
    )
