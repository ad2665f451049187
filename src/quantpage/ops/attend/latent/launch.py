"""How a step over latent rows is laid over a device: tiles, warps, programs. A pure function.

Nothing is tuned at run time. Each branch carries what made it.
"""

from dataclasses import dataclass

HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class LatentTiles:
    """The shape of a launch."""

    rows: int
    """Query rows (tokens x heads) that a program multiplies at once."""
    tile: int
    """Keys a tile."""
    warps: int
    stages: int
    """Depth of the copy pipeline; the page table's indirection takes one of them."""
    by_keys: bool
    """Products are keys by queries (triton_keys), else queries by keys (triton_rows)."""
    chunks: int = 1
    """Pieces of a row that ``by_keys`` takes one after the other, to save registers."""
    programs_per_processor: int = 1
    """The fixed grid is this times the device's multiprocessors."""
    min_tiles: int = 2
    """Smallest share of a program: a piece costs a partial result."""


def latent_tiles(
    quantized: bool, rows: int, width: int, capability: tuple[int, int] | None
) -> LatentTiles:
    """quantized: rows are codes. rows: query rows of the longest request. width: channels of a
    tile's rows, a power of two. capability: of the device; None: interpreted.
    """
    if capability == HOPPER and rows > 16:
        # Shared memory, of 227 KB: 72 of queries, 72 of float16, 36 of codes (16 bits: 144 twice).
        return LatentTiles(64, 64, 8, 3, by_keys=False)
    # One or two warps keep to the product of a warp, whose operands codes become in registers.
    return LatentTiles(16, 32, 2, 4, by_keys=True, chunks=1 if width < 512 else 4,
                       programs_per_processor=2)  # fmt: skip


def row_tiles(heads: int, query_len: int, tile: int) -> int:
    """Tiles of ``tile`` query rows that cover a request."""
    return -(-heads * query_len // tile)
