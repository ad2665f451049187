"""Tiles of queries by keys, within the shared memory of their card."""

import pytest

from quantpage.ops.attend.flash.tiles import DenseTile, fits, portable_tile

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("kilobytes", [227, 163, 99], ids=["hopper", "ampere", "ada"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("rows", [4, 512])
def test_a_portable_tile_fits_the_shared_memory_of_its_card(kilobytes, itemsize, width, rows):
    limit = kilobytes * 1024
    tile, _ = portable_tile(width, rows, itemsize, limit)
    assert fits(tile.rows, tile.keys, tile.stages, width, itemsize, limit)
    # What a matrix product wants, and copies behind it.
    assert min(tile.rows, tile.keys) >= 16 and tile.stages >= 2
    if kilobytes == 227 and itemsize == 2:
        # The shapes that were measured.
        measured = DenseTile(16, 64, 3) if rows <= 16 else DenseTile(64, 64, 3)
        assert tile == (DenseTile(64, 32, 2) if rows > 16 and width > 128 else measured)
    assert portable_tile(width, rows, itemsize, 0) == portable_tile(
        width, rows, itemsize, 227 * 1024
    )
