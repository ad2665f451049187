"""The shape of a launch over latent rows: what was measured, and what a card has room for."""

from dataclasses import replace

import pytest

from quantpage.explain import DEVICES, example_call
from quantpage.formats import find_format
from quantpage.hardware import HOPPER
from quantpage.ops import attend, gather, rope_write
from quantpage.ops.attend.latent.launch import (
    MANY,
    LatentTiles,
    fitted,
    latent_tiles,
    programs_of,
    shared_bytes,
)
from quantpage.ops.dispatch import choose

pytestmark = pytest.mark.cpu


def test_the_measured_shapes_are_taken_and_fit():
    """benchmarks/results/h100-latent.csv."""
    many, few = LatentTiles(64, 64, 8, 2), LatentTiles(16, 64, 4, 3, programs_per_processor=2)
    first = LatentTiles(16, 32, 2, 5, by_keys=True, programs_per_processor=2)
    for rows, keys, wanted in (
        (128, 64 * 4096, many),
        (128, 16 * 32768, many),
        (16, 64 * 4096, few),
        (16, 16 * 32768, first),
    ):
        tiles = latent_tiles(True, rows, keys, HOPPER)
        assert tiles == wanted == fitted(tiles, 576, 1, 227 * 1024)


def test_the_hopper_kernel_takes_what_it_was_measured_in():
    one = LatentTiles(16, 64, 4, 3, wgmma=True)
    two = LatentTiles(16, 64, 4, 2, programs_per_processor=2, wgmma=True)
    for rows, keys, wanted in (
        (1, 1, one),
        (16, 8 * 8192, one),
        (16, 64 * 4096, two),
        (1, 16 * 32768, two),
        *((32, keys, LatentTiles(32, 64, 8, 3, wgmma=True)) for keys in (1, MANY + 1)),
        *((128, keys, LatentTiles(64, 64, 8, 3, wgmma=True)) for keys in (1, MANY + 1)),
    ):
        assert latent_tiles(True, rows, keys, HOPPER, True) == wanted


@pytest.mark.parametrize("kilobytes", [0, 99, 163, 227])
@pytest.mark.parametrize("width,itemsize", [(576, 1), (576, 2), (1024, 1), (1024, 2), (128, 2)])
@pytest.mark.parametrize("rows,keys", [(16, 1), (16, MANY + 1), (128, 1)])
def test_a_shape_is_fitted_to_its_card(rows, keys, width, itemsize, kilobytes):
    wanted = latent_tiles(itemsize == 1, rows, keys, HOPPER)
    tiles = fitted(wanted, width, itemsize, kilobytes * 1024)
    assert shared_bytes(tiles, width, itemsize) <= (kilobytes or 227) * 1024
    assert tiles.tile >= 16 and tiles.stages >= 2


def test_rows_without_codes_and_other_cards_take_the_portable_shape():
    portable = LatentTiles(16, 32, 4, 3, programs_per_processor=2)
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0), None):
        assert latent_tiles(True, 128, MANY + 1, capability) == portable
    assert latent_tiles(False, 16, MANY + 1, HOPPER) == portable


@pytest.mark.parametrize(
    "all_rows,programs",
    [(1, 132), (32, 132), (124, 132), (125, 125), (128, 128), (132, 132), (133, 132)],
)
def test_rows_that_nearly_fill_the_device_are_not_cut(all_rows, programs):
    assert programs_of(LatentTiles(64, 64, 8, 2), 132, all_rows) == programs


@pytest.mark.parametrize(
    "name,attends,on_hopper",
    [
        ("none", "triton", "triton"),
        ("int8", "triton", "gluon"),
        ("fp8", "triton", "gluon"),
        ("k=int8,v=fp8", "triton", "triton"),
        ("int4", "torch", "torch"),
        ("k8v4", "torch", "torch"),
    ],
)
def test_who_serves_rows_on_a_gpu(name, attends, on_hopper):
    for device in ("Hopper", "Ampere"):
        call = replace(
            example_call(DEVICES[device], find_format(name)), q_heads=128, kv_heads=1, head_dim=512,
            value_head_dim=64, latent=True,
        )  # fmt: skip
        for phase in ("prefill", "decode"):
            wanted = on_hopper if device == "Hopper" else attends
            assert choose(attend.CANDIDATES, replace(call, phase=phase)).name == wanted
        narrow = replace(call, head_dim=256, value_head_dim=32)
        assert choose(attend.CANDIDATES, narrow).name == attends
        assert choose(rope_write.CANDIDATES, call).name == "triton"
        assert choose(gather.CANDIDATES, call).name == "triton"
        assert choose(rope_write.CANDIDATES, replace(call, head_dim=1024)).name == "torch"
