"""Pictures: text, tiles and a PNG that a reader can decode."""

import struct
import zlib

import pytest
import torch

from quantpage import masks
from quantpage.masks import CausalMask
from quantpage.masks.draw import COLOURS

pytestmark = pytest.mark.cpu


def test_text_shows_tiles_by_what_becomes_of_them():
    picture = CausalMask().draw(5, tile=(2, 2))
    assert str(picture).splitlines() == [
        "+-...",
        "++...",
        "##+-.",
        "##++.",
        "#####",
        "full 4 partial 2 skipped 3",
    ]


def test_counts_are_the_materialized_masks():
    mask = masks.causal_document([16, 16])
    assert mask.draw(32).counts() == {"full": 2, "partial": 4, "skipped": 10}


def test_png_holds_the_pixels(tmp_path):
    picture = masks.prefix_lm(9, 4).draw(9, tile=(4, 4))
    path = picture.save(tmp_path / "mask.png", cell=3)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    start = data.index(b"IDAT") + 4
    (size,) = struct.unpack(">I", data[start - 8 : start - 4])
    raw = zlib.decompress(data[start : start + size])
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(height, 1 + 3 * width)
    assert torch.equal(rows[:, 1:].reshape(height, width, 3), picture.pixels(3))
    # A pair in the middle of the skipped corner, and one in the full corner.
    assert tuple(picture.pixels(3)[4, 26].tolist()) == COLOURS["skipped"][1]
    assert tuple(picture.pixels(3)[4, 4].tolist()) == COLOURS["full"][0]


def test_tiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"tile: expected at least \(1, 1\), got \(0, 8\)"):
        CausalMask().draw(8, tile=(0, 8))
