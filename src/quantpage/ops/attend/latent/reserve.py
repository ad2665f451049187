"""Memory of decode over latent rows for every step up to a size, held before one is captured."""

from dataclasses import replace
from itertools import product

import torch

from quantpage.ops import refusals
from quantpage.ops.attend.decode.workspaces import larger, workspace
from quantpage.ops.attend.flash.tiles import processors_of
from quantpage.ops.attend.latent.launch import (
    MANY,
    hint_count,
    latent_tiles,
    programs_of,
    row_tiles,
    space,
)
from quantpage.ops.dispatch import DECODE_TOKENS, Call


def reserve(call: Call, device: torch.device, max_requests: int, max_tokens: int) -> int:
    """Hold what decode steps of up to so many requests and new tokens write partial results to.

    For the calling thread on the current stream of ``device``. Returns the bytes.
    """
    held = workspace(device, needed(call, processors_of(device), max_requests, max_tokens))
    return sum(each.nbytes for each in held)


def needed(call: Call, processors: int, max_requests: int, max_tokens: int) -> tuple[int, int, int]:
    """The largest sizes of ``workspace`` that a step up to this asks for.

    The planner is asked for every step there may be; fitting a shape to a card makes none larger
    but the number of its tiles, which are counted as the smallest there are.
    """
    codes = call.format.key.quantized and call.format.value.quantized
    hopper = not refusals.LATENT_GLUON(replace(call, phase="decode"))
    pieces = (0, 0, 0)
    for new, requests, keys, wgmma in product(
        range(1, min(DECODE_TOKENS, max_tokens) + 1),
        range(1, min(max_requests, max_tokens) + 1),
        (0, MANY + 1),
        {False, hopper},
    ):
        rows = call.q_heads * new
        tiles = latent_tiles(codes, rows, keys, call.device.capability, wgmma)
        programs = programs_of(
            tiles, processors, requests * row_tiles(call.q_heads, new, tiles.rows)
        )
        smallest = requests * row_tiles(call.q_heads, new, 16)
        numbers = hint_count(tiles, programs) + 2 * smallest
        pieces = larger(pieces, space(tiles, programs, call.head_dim, numbers))
    return pieces
