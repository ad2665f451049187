"""How a decode step is laid over the device: tile, warps, programs. A pure function of the call.

Nothing is tuned at run time. Each branch carries the measurement that made it
(benchmarks/results/, device named in the rows).
"""

from dataclasses import dataclass, replace

from quantpage.formats import QuantSpec
from quantpage.ops.attend.flash.tiles import fits, portable_width

MAX_ROWS = 64
"""Query rows (tokens x group) that one tile multiplies at once."""

EXACT_ROWS = 16
"""Query rows of a program of the Triton kernel over exact pages: 64 take 255 registers and 123 KB,
beside which little of the body fits. Measured on an H100 at 16 x 8k: beside gluon_kernel no
difference (103.3 us for 103.1 at 8 tokens of int4, 259.2 for 259.8 at 16); beside gluon_drafts 8
rows are 3 to 4 % slower, 32 rows 2 % faster at 8 tokens (benchmarks/results/h100-drafts.csv)."""

SMALL = 40_000
"""Keys of all requests and kv_heads up to which a step is bound by latency."""

WGMMA_PROCESSORS = 132
"""Multiprocessors of the device that the Hopper kernel's shapes were measured on."""

PROGRAM_BYTES = (228 * 1024 - 2 * 1024) // 2
"""Shared memory of a program of which a Hopper multiprocessor holds two; the driver has 1 KB of
each."""

JOINED_PIECES = 4
"""Pieces of a row that a warp of gluon_join takes at once."""

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
    wgmma: bool = False
    """A Hopper kernel: a warpgroup a program; gluon_kernel, codes in units of four, or:"""
    drafts: bool = False
    """gluon_drafts, codes as TMA copies them."""
    rows: tuple[int, int] = (8, MAX_ROWS)
    """Query rows of a program, at least and at most."""


EXACT_TILES = DecodeTiles(64, 4, 3, 2, whole=True, wgmma=True, drafts=True, rows=(64, 64))
"""Of gluon_exact, exact pages of 16 bits under more rows than EXACT_ROWS. Measured on an H200 at
16 x 8k, us of int4, the Triton kernel's in brackets: 16 tokens 146.1 (159.1), 8 tokens 93.6 (97.7).
"""


def decode_tiles(
    key: QuantSpec,
    value: QuantSpec,
    width: int,
    rows: int,
    keys: int,
    parts: int = 1,
    wgmma: bool = False,
    drafts: bool = False,
) -> DecodeTiles:
    """``width``: the wider of the head_dims of K and V. ``rows``: query rows of a tile. ``keys``:
    keys of all requests and kv_heads, an upper bound. ``parts``: (request, kv_head, tile of query
    rows) of the step. ``wgmma``: whether the device has the Hopper kernel, which reads no planes,
    and it takes this width. ``drafts``: whether TMA can copy the pages (triton.in_boxes).
    """
    if wgmma and key.quantized and value.quantized and not (key.code.fields or value.code.fields):
        # Of 16 rows too where values are unpacked and keys are not: k8v4.
        mixed = rows > 8 and keys > SMALL and (key.code.name, value.code.name) == ("int8", "int4")
        if drafts and (rows > 16 or mixed) and width == 128 and key.code.name != "fp8":
            return drafts_tiles(key, value)
        tiles = _wgmma_tiles(key, value, width, rows, keys, parts)
        if tiles is not None:
            return tiles
    return _triton_tiles(key, value, width, rows, keys, parts)


def _wgmma_tiles(
    key: QuantSpec, value: QuantSpec, width: int, rows: int, keys: int, parts: int
) -> DecodeTiles | None:
    """Where the Hopper kernel is the faster one, and its shape. Measured on an H200, us of 32 query
    heads on 8 of 128 (stages, programs a multiprocessor), beside the Triton kernel's best:

        int8, a token   1 x 4k   1 x 32k  8 x 8k   16 x 8k  64 x 4k  16 x 32k  128 x 1k
        (2, 1)          9.5
        (2, 2)          10.2     25.0     39.2     70.3     136.8    257       80
        (4, 2)                   25.8     40.2
        (3, 3)                   28.5     40.6     72.2     134.6    255       78
        (3, 4)                   27.9     43.6              134.0    258
        Triton          11.5     29.1     44.1     75.6     136.7    262       70.5

        k8v4, a token   (2, 2)   22.8     34.7              120      (3, 3) 64 x 4k 109.6
                        Triton   25.2     39.0              111
        int4, a token   (3, 3)   21.5     32.4              96       (2, 1) 1 x 4k 10.1
                        Triton   24.2     33.7              81       1 x 4k 12.7
        the same on an H100, exact pages beside: 8 x 8k 39.6 (Triton 47.5), 64 x 4k 132.6 (127.5)
        and behind the body: 16 x 8k 63.1 (66.8), 1 x 64k and 15 x 4k 66.0 (71.3), 16 x 32k 212.8
        (211.8); codes alone 64 x 4k 116.3 (109.8), 128 x 1k 69.1 (63.5), 1 x 100k and 63 x 512 75.8
        (74.7)

        drafts at 16 x 8k, Triton in brackets: int8 4, 8, 16 tokens (3, 2) 74.4 (80.5), 87.3 (119),
        148 (393); fp8 8 tokens (3, 2) 87.3 (120); int4 4 tokens (3, 3) 59.5 (77.3), 8 tokens
        (3, 2) 92 (175), (4, 2) the same. head_dim 256, (2, 2): int8 64 x 4k 250 (284), 8 tokens at
        16 x 8k 154 (232)

    and on an H200 in 2026-11 (h200-plans.csv), int8 at 16 x 32k, 1 x 128k and 31 x 4k, 1 x 128k
    (3, 4) 253.9, 130.0, 73.9, Triton 261.5, 138.0, 77.8; int4 at 1 x 100k and 63 x 512 under a
    window of 4k, 512 parts, (3, 3) 38.4, Triton 34.3; k8v4 with its exact pages on an H100
    (h100-decode.csv) at 16 x 8k, 8 x 8k, 1 x 32k, 1 x 64k and 15 x 4k (3, 3) 80.5, 46.6, 27.4,
    80.5, (4, 2) 85.4, 47.8, 27.7, 84.2, Triton 84.4, 50.2, 33.9; 2 tokens 88.3 for 86.4

    In a whole model of 32 layers with 16 requests of 16k, 16 GB of int8 cache, (2, 2) made a step
    12.97 ms where the Triton kernel's took 12.06: 64 KB asked for ahead a multiprocessor hide the
    benches' latency, not that of so much memory. So four stages here, 128 KB, and for long steps of
    few rows (3, 4), 200 KB, of int8, and the Triton kernel's 150 KB of others.
    """
    few = parts <= 2 * WGMMA_PROCESSORS
    if width > 128:
        return DecodeTiles(64, 4, 2, 2, wgmma=True) if rows <= 32 else None
    if rows > 8:
        two = rows > 16 or (few and value.code.name != "int4")
        return _two_programs() if two else _three_programs()
    if keys <= SMALL:
        return DecodeTiles(64, 4, 2, 1, wgmma=True)
    if key.code.name == "int4":
        # Of more rows than programs each has several to begin, and Triton's kernel more programs.
        most = 27 if few else 14 if parts <= 3 * WGMMA_PROCESSORS else 0
        return _three_programs() if keys <= most * SMALL else None
    if few and keys <= 27 * SMALL:
        return _three_programs() if value.code.name == "int4" else _two_programs()
    if few and not (key.code.name == value.code.name == "int8"):
        return None
    if parts > 4 * WGMMA_PROCESSORS:
        # More rows than programs: a warpgroup takes longer to end one and begin another.
        return None
    if value.code.name == "int4":
        return _three_programs()
    return DecodeTiles(64, 4, 3, 4, 128, wgmma=True)


def drafts_tiles(key: QuantSpec, value: QuantSpec) -> DecodeTiles:
    """Two programs a multiprocessor, and as many tiles under way as they have room for. Measured on
    an H200 at 16 x 8k, us, the kernel of few rows in brackets (h200-drafts.csv):

                    a token     8 tokens        16 tokens
        int8        72.2        79.3 (86.8)     105.6
        k8v4        67.9        86.2 (92.6)     116.6
        int4        51.2        92.5 (93.6)     121.0
        int4, 4 tokens          89.0 (68.4)

    and of 4 tokens on an H100 at 16 x 8k, 8 x 8k, 64 x 4k, 1 x 4k: k8v4 89.8, 54.1, 185, 18.0
    (three programs 91.8, 57.1, 188, 15.9, two 109.5, 62.0), at 16 x 8k int8 101.0 (102.3), int4
    90.1 (74.5).

    fp8 keys, unpacked to float16 as its values are, took 157.3 us at 16 tokens (142.1) in the form
    without a warp that copies, and are the other kernel's.
    """
    # Of a tile of 64 keys of 128: what lands, beside what is multiplied: two tiles of values in
    # float16 and of 4-bit keys as bytes, queries, and four numbers of each key of three tiles.
    landing = 64 * sum(
        16 * half.code.bits + half.dynamic * half.scale_dtype.itemsize * (1 + half.zero_point)
        for half in (key, value)
    )
    kept = 1024 * (2 * 16 + 16 + 4 + 16 * (key.code.name == "int4"))
    stages = (PROGRAM_BYTES - kept) // landing
    return DecodeTiles(64, 4, stages, 2, 128, wgmma=True, drafts=True, rows=(32, 64))


def _two_programs() -> DecodeTiles:
    return DecodeTiles(64, 4, 4, 2, wgmma=True)


def _three_programs() -> DecodeTiles:
    return DecodeTiles(64, 4, 3, 3, 168, wgmma=True)


def _triton_tiles(
    key: QuantSpec, value: QuantSpec, width: int, rows: int, keys: int, parts: int
) -> DecodeTiles:
    """One warp a program needs no barrier between warps, and eight programs hide each other's
    beginnings and ends. Measured on an H200, TB/s of int8 at 16 x 32k / 64 x 4k / 8 x 8k, head_dim
    128 (copy: 4.25):

        tile 32, 1 warp,  8 programs    4.05  3.65  2.86
        tile 32, 1 warp, 12 programs    4.02  3.65  2.54    shallower pipeline, 168 registers
        tile 64, 2 warps, 6 programs    3.99  3.57  2.44    168 registers
        tile 32, 1 warp, 16 programs    3.65  3.55  2.23    128 registers
        tile 64, 1 warp,  9 programs    3.22  3.42  2.23

    and of int4: tile 64, 8 programs 3.61, 3.00, 2.06; tile 32, 12 programs 2.76, 2.55, 1.48.
    Planes on an H100, us of int6 and int3 at 64 x 4k, 16 x 32k, 1 x 32k, 8 x 8k, stages in brackets
    (int4, the first of them: 111, 208, 27.4, 40.5):

        tile 64, 1 warp, 8 programs (5)    163 313 34.8 53.7    108 206 26.8 41.4
        tile 64, 1 warp, 8 programs (4)    164 315 32.7 52.5    106 202 24.6 38.6
        tile 64, 1 warp, 8 programs (7)    168 319 37.6 56.4    110 206 28.9 43.6
        tile 32, 1 warp, 8 programs (5)    169 324 36.2 52.6    135 253 31.4 43.4

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
    eighths = all(spec.code.name == "int4" or spec.code.fields for spec in (key, value))
    planes = any(spec.code.fields for spec in (key, value))
    # Planes under 16 rows take more registers than a thread has (compiled, not measured).
    if width <= 64 or (eighths and width <= 128 and not (planes and rows > 8)):
        return DecodeTiles(64, 1, 4 if planes else 5, 8, min_tiles=2)
    gather = 16 if rows <= 8 and parts >= JOINED and not eighths else 0
    return DecodeTiles(32, 1, 5, 8 if width <= 128 else 6, min_tiles=2, gather=gather)


def fitted(tiles: DecodeTiles, rows: int, width: int, itemsize: int, limit: int) -> DecodeTiles:
    """Copies in flight as the card's shared memory has room for: pages of 16 bits on a card with
    less than Hopper, pages of 32 bits anywhere.

    width: the wider of the head_dims. limit: bytes a program may have, 0 where unknown.
    """
    padded = portable_width(width)
    # Two of the stages are the page table's.
    while not fits(rows, tiles.tile, tiles.stages - 2, padded, itemsize, limit):
        if tiles.stages > 3:
            tiles = replace(tiles, stages=tiles.stages - 1)
        elif tiles.tile > 16:
            tiles = replace(tiles, tile=tiles.tile // 2)
        else:
            # 64 rows of 256 float32 channels in 99 KB: 1 KB more than that by count, compiled less.
            break
    return tiles


def programs_of(tiles: DecodeTiles, processors: int, all_rows: int) -> int:
    """Programs of a launch; all_rows: (request, kv_head, tile of query rows) of the step."""
    # Of whole rows one each: who is done leaves its place to the next.
    return all_rows if tiles.whole else processors * tiles.programs_per_processor


def join_shape(programs: int, all_rows: int, width: int) -> tuple[int, int]:
    """Pieces of a row that the launch that joins them takes at once, and its warps. width: channels
    of a value.

    One warp: each of its threads has a few channels of all pieces, where more warps have to
    exchange them. Sixteen pieces cost rows of fewer nothing; where rows have more, turns of 32 as
    long as registers hold them. Measured on an H100, us of int4 at 1 x 4k and at 1 x 100k and
    63 x 512 (copy at 2.98 TB/s; h100-decode.csv), and on an H200, of int8 at 1 x 4k cut into 33
    pieces a row (4.26 TB/s; h200-plans.csv), by (pieces, warps):

                    (4, 1)  (16, 1)       (32, 1)  (16, 2)  (16, 4)  (32, 2)  (32, 4)     (64, 4)
        1 x 4k              9.3                             9.9               10.0, 10.1
        1 x 100k ..  92.1   88.1, 88.8             105.0             101.8    110.9
        33 pieces           8.2           8.1                                             10.1
    """
    return 32 if programs // all_rows > 16 and width <= 128 else 16, 1


def most_pieces(programs: int, all_rows: int, lengths: tuple[int, ...]) -> int:
    """Pieces of the longest row, about: it has its share of the programs, and begins within one.

    lengths: keys that each request's queries see, an upper bound.
    """
    rows_a_request = all_rows // len(lengths)
    return programs * max(lengths) // max(1, sum(lengths) * rows_a_request) + 1


def joined_together(pieces: int, all_rows: int, queries: int, width: int) -> int:
    """Query rows that a program of gluon_join joins, JOINED_PIECES of each at once; 0: a program of
    triton_cuts joins each, more of its pieces at once. queries: rows of one of ``all_rows``.

    Measured on an H100, us by triton_cuts, then by four rows at once and four pieces, four rows and
    eight pieces, eight rows and four pieces (h100-drafts.csv):

        16 x 8k, 16 tokens  int4  127.5  120.4  121.2  120.6    k8v4  123.7  117.3  119.3  118.6
                            int8  119.9  112.3  113.6  112.7
        16 x 8k, 8 tokens   int4   95.8   92.6   93.7   93.1    int8  106.1  102.1  102.4  102.3
        8 x 8k, 16 tokens   int4   75.9   72.6   72.6   72.6
        128 x 1k, a token   int4   90.5   88.9                  k8v4  107.7  105.5

    and 1 x 100k and 63 x 512, a token of int4, 100 pieces of whose first row: 80.6 by triton_cuts,
    90.6 by four pieces at once, 81.7 by sixteen.
    """
    many = all_rows * queries >= 2048 and queries >= 4
    return 4 if many and pieces <= 2 * JOINED_PIECES and width == 128 else 0


def chunk_of(requests: int, one: bool = False) -> int:
    """Requests that a program's plan holds in one vector: few sizes, so that few kernels exist.

    one: whether the kernel has a plan for one request, which is shorter.
    """
    if one and requests == 1:
        return 1
    return 32 if requests <= 32 else 128 if requests <= 128 else 512


def row_tiles(group: int, query_len: int, least: int = 8, most: int = MAX_ROWS) -> tuple[int, int]:
    """Rows of a tile, a power of two, and how many such tiles cover a request."""
    rows = group * query_len
    tile = least
    while tile < rows and tile < most:
        tile *= 2
    return tile, -(-rows // tile)
