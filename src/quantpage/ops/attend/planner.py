"""How a decode step is laid over the device: tile, warps, programs. A pure function of the call.

Nothing is tuned at run time. Each branch carries the measurement that made it
(benchmarks/results/, device named in the rows).
"""

from dataclasses import dataclass

from quantpage.formats import QuantSpec

MAX_ROWS = 64
"""Query rows (tokens x group) that one tile multiplies at once."""


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """The shape of a decode launch."""

    tile: int
    """Keys a tile."""
    warps: int
    stages: int
    """Depth of the copy pipeline; the page table's indirection takes two of them."""
    programs_per_processor: int
    """The fixed grid is this times the device's multiprocessors."""
    registers: int | None = None
    """Cap a thread, so that as many programs as the grid has fit; None: the compiler's choice."""
    min_tiles: int = 1
    """Smallest share of a program: a piece costs a partial result."""


def decode_tiles(key: QuantSpec, value: QuantSpec, width: int, page_size: int) -> DecodeTiles:
    """``width``: the wider of the head_dims of K and V."""
    if not key.quantized and not value.quantized:
        tile, stages = (64, 4) if width <= 128 else (32, 4)
        return DecodeTiles(tile, 4, stages, 2)
    if "int4" in (key.code.name, value.code.name):
        return DecodeTiles(64, 2, 5, 4) if width <= 128 else DecodeTiles(64, 4, 5, 2)
    if width <= 64:
        return DecodeTiles(64, 1, 5, 6)
    if width <= 128:
        return DecodeTiles(128 if page_size >= 128 else 64, 4, 5, 3)
    return DecodeTiles(64, 4, 5, 2)


def row_tiles(group: int, query_len: int) -> tuple[int, int]:
    """Rows of a tile (a power of two of at least 16) and how many such tiles cover a request."""
    rows = group * query_len
    tile = 16
    while tile < rows and tile < MAX_ROWS:
        tile *= 2
    return tile, -(-rows // tile)
