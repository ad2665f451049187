"""How a step over latent rows is laid over a device: tiles, warps, programs. A pure function.

Nothing is tuned at run time. Each branch carries the measurement that made it
(benchmarks/results/h100-latent.csv).
"""

from dataclasses import dataclass, replace

from quantpage.hardware import HOPPER
from quantpage.ops.attend.decode.workspaces import piece_sizes
from quantpage.ops.attend.flash.tiles import HOPPER_SHARED_BYTES

HINTS = 4
"""Of a program: the most tiles that are asked for before any is multiplied."""
MANY = 400_000
"""Keys of all requests from which keys by queries is the faster one."""


LONG = 100_000
"""The same from which the Hopper kernel has two programs a multiprocessor: each takes a row's
queries and leaves a piece of it, which has to pay."""


@dataclass(frozen=True, slots=True)
class LatentTiles:
    """The shape of a launch."""

    rows: int
    """Query rows (tokens x heads) that a program multiplies at once."""
    tile: int
    """Keys a tile."""
    warps: int
    stages: int
    """Depth of the copy pipeline; the page table's indirection takes half of it."""
    by_keys: bool = False
    """Products are keys by queries (triton_keys), else queries by keys (triton_rows)."""
    programs_per_processor: int = 1
    """The fixed grid is this times the device's multiprocessors."""
    min_tiles: int = 2
    """Smallest share of a program: a piece costs a partial result."""
    wgmma: bool = False
    """The Hopper kernel (gluon_kernel), whose tiles have 64 keys."""


def latent_tiles(
    codes: bool,
    rows: int,
    keys: int,
    capability: tuple[int, int] | None,
    wgmma: bool = False,
) -> LatentTiles:
    """codes: both halves are. rows: query rows of the longest request. keys: of all requests, an
    upper bound. capability: of the device; None: interpreted. wgmma: the Hopper kernel takes it.

    Measured on an H100, us of int8, a row of 512 and 64 rotary channels (rows, tile, warps, stages,
    programs a multiprocessor):

        128 heads                       64 x 4k   16 x 32k
        (64, 64, 8, 2, 1)               376       589
        (64, 64, 8, 3, 1)               370       742
        (64, 32, 8, 2, 1)               490       817

        16 heads                        64 x 4k   16 x 32k
        (16, 64, 4, 3, 2)               119.7     233.9
        (16, 32, 4, 3, 2)               124.4     229.0
        (16, 32, 2, 5, 2) keys first    131.8     213.9
        (64, 64, 8, 2, 1)               199.5     304.4

    and the Hopper kernel:

        128 heads                       64 x 4k   16 x 32k
        (64, 64, 8, 3, 1)               189.8     372.6
        (32, 64, 8, 3, 1)               307.3     544.5

        16 heads                        64 x 4k   16 x 32k   8 x 8k   64 x 128
        (16, 64, 4, 2, 2)               66.9      117.8      26.4     11.8
        (16, 64, 4, 3, 1)               67.6      120.2      25.2     9.5
        (16, 64, 4, 4, 1)               68.1      121.7      26.3
    fp8:
        (16, 64, 4, 2, 2)               75.0      124.2      30.6
        (16, 64, 4, 3, 1)               76.1      131.5      30.3
        (16, 64, 4, 4, 1)               77.7      132.8      31.6
    and int8 as it was first:
        (16, 64, 8, 3, 1)               76.5      128.0
        (32, 64, 8, 3, 1)               85.3      151.6

    16-bit rows and other devices have not been measured: they take the tile of 32 keys, which keeps
    to its registers from either on every target that it was compiled for.
    """
    if wgmma:
        if rows > 32:
            return LatentTiles(64, 64, 8, 3, wgmma=True)
        if rows > 16:
            # Two warpgroups, as outputs fill half of the registers of one.
            return LatentTiles(32, 64, 8, 3, wgmma=True)
        if keys > LONG:
            # One program's threads work while the other's wait for each other.
            return LatentTiles(16, 64, 4, 2, programs_per_processor=2, wgmma=True)
        return LatentTiles(16, 64, 4, 3, wgmma=True)
    if capability == HOPPER and rows > 16:
        return LatentTiles(64, 64, 8, 2)
    if capability == HOPPER and codes:
        if keys > MANY:
            # One or two warps keep to the product of a warp, whose operands codes become in
            # registers.
            return LatentTiles(16, 32, 2, 5, by_keys=True, programs_per_processor=2)
        return LatentTiles(16, 64, 4, 3, programs_per_processor=2)
    return LatentTiles(16, 32, 4, 3, programs_per_processor=2)


def fitted(tiles: LatentTiles, width: int, itemsize: int, limit: int) -> LatentTiles:
    """``tiles`` as the card's shared memory has room for: fewer copies in flight, then fewer keys,
    then fewer query rows.

    width: channels of a tile's rows, rotary ones included. itemsize: bytes of one in the pages.
    limit: bytes a program may have, 0 where unknown (Hopper's).
    """
    while shared_bytes(tiles, width, itemsize) > (limit or HOPPER_SHARED_BYTES):
        if tiles.stages > 4:
            tiles = replace(tiles, stages=tiles.stages - 2)
        elif tiles.tile > 16:
            tiles = replace(tiles, tile=tiles.tile // 2)
        elif tiles.rows > 16:
            tiles = replace(tiles, rows=16, warps=4)
        else:
            # 1,024 channels of 16 bits under 16 rows: 67 KB by count, which every card has.
            break
    return tiles


def shared_bytes(tiles: LatentTiles, width: int, itemsize: int) -> int:
    """The most that Triton takes of shared memory: queries, tiles in flight, and what they become.

    Of what a warpgroup multiplies a tile more lies there, as numbers of 16 bits; keys by queries
    copies tiles in two orders.
    """
    in_flight = max(1, (tiles.stages - 1) // 2) * (2 if tiles.by_keys else 1)
    numbers = tiles.rows * (width + tiles.tile)
    if tiles.rows >= 64:
        numbers += tiles.tile * width
    return 2 * numbers + in_flight * tiles.tile * (itemsize * width + 8) + 1024


def programs_of(tiles: LatentTiles, processors: int, all_rows: int) -> int:
    """Programs of a launch; all_rows: (request, tile of query rows) of the step.

    Where nearly as many as fit are there, each takes one whole: a piece of 64 rows writes 128 KB
    that another launch reads. (At 64 x 4k with 128 heads: 128 programs of 132, 34 MB not written.)
    """
    programs = processors * tiles.programs_per_processor
    return all_rows if all_rows <= programs <= all_rows * 17 // 16 else programs


def space(tiles: LatentTiles, slots: int, width: int, numbers: int) -> tuple[int, int, int]:
    """What a launch wants of decode/workspaces: two partial results a slot, int32 ``numbers``."""
    outs, sums, _ = piece_sizes(slots, tiles.rows, width, 0)
    return outs, sums, numbers


def hint_count(tiles: LatentTiles, programs: int) -> int:
    """Places that the Hopper kernel's programs keep of their first tiles, before the rest."""
    return HINTS * programs if tiles.wgmma else 0


def row_tiles(heads: int, query_len: int, tile: int) -> int:
    """Tiles of ``tile`` query rows that cover a request."""
    return -(-heads * query_len // tile)
