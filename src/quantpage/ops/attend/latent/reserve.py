"""Memory of decode over latent rows for every step up to a size, held before one is captured."""

import torch

from quantpage.ops.attend.decode.workspaces import larger, piece_sizes, workspace
from quantpage.ops.attend.flash.tiles import processors_of
from quantpage.ops.attend.latent.launch import MANY, latent_tiles, programs_of, row_tiles
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
    pieces = (0, 0, 0)
    for new in range(1, min(DECODE_TOKENS, max_tokens) + 1):
        heads = call.q_heads
        for requests in range(1, min(max_requests, max_tokens) + 1):
            for keys in (0, MANY + 1):
                tiles = latent_tiles(codes, heads * new, keys, call.device.capability)
                programs = programs_of(
                    tiles, processors, requests * row_tiles(heads, new, tiles.rows)
                )
                smallest = requests * row_tiles(heads, new, 16)
                asked = piece_sizes(programs, tiles.rows, call.head_dim, smallest)
                pieces = larger(pieces, asked)
    return pieces
