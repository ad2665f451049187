"""Decode's memory for every step up to a size, held before one is measured or captured."""

import torch

from quantpage.ops.attend.decode.launch import decode_tiles, programs_of, row_tiles
from quantpage.ops.attend.decode.workspaces import (
    counter_count,
    counters_of,
    larger,
    piece_sizes,
    workspace,
)
from quantpage.ops.attend.flash.tiles import processors_of
from quantpage.ops.dispatch import DECODE_TOKENS, Call


def reserve(call: Call, device: torch.device, max_requests: int, max_tokens: int) -> int:
    """Hold what decode steps of up to so many requests and new tokens write partial results to.

    For the calling thread on the current stream of ``device``. Returns the bytes.
    """
    sizes, counters = needed(call, processors_of(device), max_requests, max_tokens)
    held = [*workspace(device, sizes), counters_of(device, counters)]
    return sum(each.nbytes for each in held)


def needed(
    call: Call, processors: int, max_requests: int, max_tokens: int
) -> tuple[tuple[int, int, int], int]:
    """The largest sizes of ``workspace``, and of ``counters_of``, that a step up to this asks for.

    The planner is asked for every step there may be, as more requests may get fewer programs.
    """
    width = max(call.head_dim, call.value_head_dim)
    pieces, counters = (0, 0, 0), 0
    for new in range(1, min(DECODE_TOKENS, max_tokens) + 1):
        rows, tiles_of_rows = row_tiles(call.group, new)
        for requests in range(1, min(max_requests, max_tokens) + 1):
            all_rows = requests * call.kv_heads * tiles_of_rows
            shapes = {
                decode_tiles(
                    call.format.key, call.format.value, width, rows, 1 << keys, all_rows, *kernels
                )
                for keys in range(0, 40)
                for kernels in ((False, False), (True, False), (True, True))
            }
            for tiles in shapes:
                own, tiles_of_rows = row_tiles(call.group, new, *tiles.rows)
                items = requests * call.kv_heads * tiles_of_rows
                programs = programs_of(tiles, processors, items)
                exact = call.format.exact_pages is not None
                asked = piece_sizes(programs, own, call.value_head_dim, items, exact)
                pieces = larger(pieces, asked)
                counters = max(counters, counter_count(programs, items, tiles.gather))
    return pieces, counters
