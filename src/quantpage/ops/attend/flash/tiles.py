"""What launches are laid out by: tiles of queries by keys, the workspace's cap, processors."""

from dataclasses import dataclass, replace

import torch

from quantpage.hardware import device_info

WORKSPACE_BYTES = 128 * 2**20
"""Default cap of the workspace (K and V together). Measured on an H200 in turns, int8, 32/8 heads
of 128, caps of 32, 64, 128 and 300 MB: 512 tokens on 128k 2.39, 2.09, 1.98, 2.03 ms, 512 on 32k
0.61, 0.54, 0.51, 0.54 ms, 2k on 32k 1.93, 1.85, 1.86, 1.85 ms. Small passes read back from the L2
what was just written, and pay a launch and a carried output each."""


HOPPER_SHARED_BYTES = 227 * 1024
"""That one program may have; taken for what a device does not say."""


def processors_of(device: torch.device) -> int:
    """Processors that a launch is for; a few on a CPU, where kernels are interpreted."""
    return device_info(device).processors if device.type == "cuda" else 3


@dataclass(frozen=True, slots=True)
class DenseTile:
    """The kernel's tile: rows of (token, head of the group) pairs by keys."""

    rows: int
    keys: int
    stages: int
    """K and V tiles in flight."""


def portable_tile(head_dim: int, rows: int, itemsize: int, limit: int) -> tuple[DenseTile, int]:
    """Tile and warps for a padded head_dim and the most packed rows of one request.

    H200, 1 x 16k causal, head_dim 128, TFLOP/s: from int8 pages 242 with 64 rows and 4 warps, 222
    with 128 and 8; over a float16 workspace 377 and 318 (128 x 128: 358, with spills).
    itemsize: of a number in products. limit: bytes of shared memory that a program may have, 0
    where unknown; a tile that may not fit (of float32, or on a card with less than Hopper) gets
    fewer copies in flight, then fewer keys.
    """
    if rows <= 16:
        tile = DenseTile(rows=16, keys=64, stages=3)
    elif head_dim <= 128:
        tile = DenseTile(rows=64, keys=64, stages=3)
    else:
        tile = DenseTile(rows=64, keys=32, stages=2)
    while not fits(tile.rows, tile.keys, tile.stages, head_dim, itemsize, limit):
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.keys > 16:
            tile = replace(tile, keys=tile.keys // 2)
        else:
            tile = replace(tile, rows=tile.rows // 2)
    return tile, 4


def fits(rows: int, keys: int, in_flight: int, width: int, itemsize: int, limit: int) -> bool:
    """Whether a program's shared memory is within ``limit`` bytes (0: Hopper's).

    The most that Triton takes of it: queries, weights, and tiles of K and V in flight. Strides and
    releases decide whether it does: decode of float32 pages, 64 rows by 64 keys of 128 channels,
    three in flight, asked for all of this (246,784 bytes) on an H200; others for a third.
    """
    numbers = rows * (width + keys) + 2 * in_flight * keys * width
    return itemsize * numbers + 1024 <= (limit or HOPPER_SHARED_BYTES)


def portable_width(head_dim: int) -> int:
    """Channels of a tile: a power of two, at least a matrix product's 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def hopper_tile(head_dim: int, value_dim: int) -> DenseTile:
    """The tile for these channels; each fits 227 KB of shared memory and 240 registers."""
    if max(head_dim, value_dim) <= 128:
        return DenseTile(rows=128, keys=128, stages=2)
    return DenseTile(rows=128, keys=64, stages=2)


def hopper_width(head_dim: int) -> int:
    """Channels of a tile: wgmma and the swizzle want at least 64."""
    return max(64, 1 << (head_dim - 1).bit_length())
