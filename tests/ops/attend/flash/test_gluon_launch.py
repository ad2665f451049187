"""What TMA is given of a step's queries: host arithmetic, no GPU."""

import pytest
import torch

from quantpage.ops.attend.flash.gluon_launch import query_tiles
from quantpage.ops.attend.flash.tiles import hopper_tile

pytestmark = pytest.mark.cpu


def test_queries_are_copied_by_tiles_of_whole_tokens():
    """Where addresses are multiples of 16 bytes and shared memory has room beside keys."""
    q = torch.empty(5, 8, 128, dtype=torch.bfloat16)
    tile = hopper_tile(128, 128)
    for group in (1, 2, 4, 8):
        made = query_tiles(q, group, tile)
        assert made is not None and made.block_shape == [128 // group, group, 128]
    assert query_tiles(torch.empty(5, 8, 80, dtype=torch.float16), 4, tile) is not None
    padded = torch.empty(5, 8, 132, dtype=torch.bfloat16)[..., :128]
    shifted = torch.empty(5 * 8 * 128 + 1, dtype=torch.bfloat16)[1:].view(5, 8, 128)
    for given in (padded, shifted):
        assert query_tiles(given, 4, tile) is None
    assert query_tiles(q, 7, tile) is None
    wide = torch.empty(5, 8, 256, dtype=torch.bfloat16)
    assert query_tiles(wide, 4, hopper_tile(256, 256)) is None
    # Its values are wider: key tiles are of half the keys.
    assert query_tiles(q, 4, hopper_tile(128, 256)) is None
