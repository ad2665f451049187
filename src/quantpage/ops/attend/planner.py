"""How a decode step is laid over the device: tile, warps, programs. A pure function of the call.

Nothing is tuned at run time. Each branch carries the measurement that made it
(benchmarks/results/, device named in the rows).
"""

from dataclasses import dataclass

from quantpage.formats import QuantSpec

MAX_ROWS = 64
"""Query rows (tokens x group) that one tile multiplies at once."""

SMALL = 40_000
"""Keys of all requests and kv_heads up to which a step is bound by latency."""

JOINED = 44
"""Parts of a step from which the last program at a row joins its pieces: no more than 24, then."""


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
    whole: bool = False
    """Programs take whole rows: nothing is cut, nothing is joined."""
    gather: int = 0
    """Pieces of a row that one program joins at once; 0: a launch of its own joins them."""


def decode_tiles(
    key: QuantSpec, value: QuantSpec, width: int, rows: int, keys: int, parts: int = 1
) -> DecodeTiles:
    """``width``: the wider of the head_dims of K and V. ``rows``: query rows of a tile. ``keys``:
    keys of all requests and kv_heads, an upper bound. ``parts``: (request, kv_head, tile of query
    rows) of the step.

    One warp a program needs no barrier between warps, and eight programs hide each other's
    beginnings and ends. Measured on an H200, TB/s of int8 at 16 x 32k / 64 x 4k / 8 x 8k, head_dim
    128 (copy: 4.25):

        tile 32, 1 warp,  8 programs    4.05  3.65  2.86
        tile 32, 1 warp, 12 programs    4.02  3.65  2.54    shallower pipeline, 168 registers
        tile 64, 2 warps, 6 programs    3.99  3.57  2.44    168 registers
        tile 32, 1 warp, 16 programs    3.65  3.55  2.23    128 registers
        tile 64, 1 warp,  9 programs    3.22  3.42  2.23

    and of int4: tile 64, 8 programs 3.61, 3.00, 2.06; tile 32, 12 programs 2.76, 2.55, 1.48.
    16-bit pages read 4.3 with any; four warps win at 1 x 4k (int8: 11.2 against 12.8 us). Drafts of
    int8 at 16 x 8k, us (one token: 83):

        8 tokens, 32 rows: tile 64, 2 warps 131    tile 32, 2 warps 153    tile 64, 4 warps 175
        4 tokens, 16 rows: tile 64, 2 warps 89     tile 32, 1 warp 95      tile 32, 2 warps 116
    """
    if rows > 32:
        return DecodeTiles(64, 4, 5, 2) if width <= 128 else DecodeTiles(32, 4, 4, 2)
    if not key.quantized and not value.quantized:
        return DecodeTiles(64, 4, 4, 3) if width <= 128 else DecodeTiles(32, 4, 4, 3)
    bytes_each = {key.code.name, value.code.name} <= {"int8", "fp8"}
    if rows > 16:
        return DecodeTiles(64, 2, 4, 4) if bytes_each and width <= 128 else DecodeTiles(32, 2, 5, 4)
    if keys <= SMALL and width <= 128:
        return DecodeTiles(64, 4, 4, 2)
    if rows > 8 and bytes_each and width <= 128:
        return DecodeTiles(64, 2, 5, 4)
    four_bits = key.code.name == "int4" and value.code.name == "int4"
    if width <= 64 or (four_bits and width <= 128):
        return DecodeTiles(64, 1, 5, 8, min_tiles=2)
    gather = 16 if rows <= 8 and parts >= JOINED and not four_bits else 0
    return DecodeTiles(32, 1, 5, 8 if width <= 128 else 6, min_tiles=2, gather=gather)


def row_tiles(group: int, query_len: int) -> tuple[int, int]:
    """Rows of a tile (a power of two of at least 8) and how many such tiles cover a request."""
    rows = group * query_len
    tile = 8
    while tile < rows and tile < MAX_ROWS:
        tile *= 2
    return tile, -(-rows // tile)
