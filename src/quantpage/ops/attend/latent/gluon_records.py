"""What the functions of the Hopper kernel of latent rows give each other, by name.

A record costs no instruction: its fields are values like any others, or constants.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpage.ops.attend.decode.gluon_operands import copy_layout
from quantpage.ops.attend.decode.gluon_share import copy_codes, page_of, tile_at, token_plane
from quantpage.ops.attend.flash.triton_segments import ALL_KEYS
from quantpage.ops.triton.common import FP8


@dataclass(frozen=True, slots=True)
class Fixed:
    """What is compiled in: one constant, whose fields are constants."""

    CODE: int
    ROW_DIM: int
    HEADS: int
    PAGE: int
    ROWS: int
    TILE: int
    FULL: bool
    WINDOW: bool
    SOFTCAP: bool
    SINKS: bool
    product: Any
    """Layout of scores as they are multiplied: beside integer codes a query is two numbers."""
    scores: Any
    """Layout of scores."""
    outputs: Any
    """Layout of outputs."""


@gluon.constexpr_function
def fixed_of(code, row_dim, heads, page, rows, full, window, softcap, sinks, warps):
    """With the layouts that threads hold a tile of 64 keys in."""
    groups = warps // 4
    scores = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, rows // groups, 16])
    product = scores
    if code != FP8:
        product = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, 2 * rows // groups, 32])
    outputs = gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
    if rows == 64:
        outputs = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, rows, 16])
    return Fixed(
        code, row_dim, heads, page, rows, 64, full, window, softcap, sinks, product, scores, outputs
    )


class Pages(NamedTuple):
    """The layer's rows and their rotary channels: codes as 32-bit words, scales, and how far pages
    are apart.
    """

    codes: Any
    scale: Any
    rotary_codes: Any
    rotary_scale: Any
    step: Any
    scale_step: Any
    rotary_step: Any
    rotary_scale_step: Any


class Table(NamedTuple):
    """Of a request: its pages' numbers, and the last key, past which none is followed."""

    pages: Any
    last_key: Any


class Rings(NamedTuple):
    """Tiles under way in shared memory, as words [stages, keys, words]."""

    rows: Any
    rotary: Any


class Seen(NamedTuple):
    """A tile of query rows, and what it sees; key ranges and their tiles as in
    decode/triton_share.
    """

    context: Any
    q_start: Any
    q_len: Any
    a_low: Any
    a_high: Any
    b_low: Any
    b_high: Any
    a_first: Any
    a_tiles: Any
    b_first: Any
    row_first: Any
    """Of the request's query rows."""
    first_tile: Any
    last_tile: Any
    window: Any
    sink_tokens: Any


class Results(NamedTuple):
    """Where rows go: to the results, or to pieces."""

    out: Any
    lse: Any
    part_out: Any
    part_lse: Any
    sinks: Any
    out_token: Any
    out_head: Any


@gluon.jit
def first_key(seen, t, FIXED: gl.constexpr):
    """Of tile t."""
    TILE: gl.constexpr = FIXED.TILE
    return tile_at(t, seen.a_first, seen.a_tiles, seen.b_first, FIXED.WINDOW, ALL_KEYS) * TILE


@gluon.jit
def page_at(table, seen, t, FIXED: gl.constexpr):
    """Of tile t, or of the last."""
    return page_of(
        table.pages, t, seen.last_tile, seen.a_first, seen.a_tiles, seen.b_first, FIXED.PAGE,
        FIXED.TILE, FIXED.WINDOW, ALL_KEYS,
    )  # fmt: skip


@gluon.jit
def scales_at(pages, page, table, key_start, FIXED: gl.constexpr, layout: gl.constexpr):
    """A tile's scales, of rows and of their rotary channels, as they lie."""
    scale = token_plane(
        pages.scale, pages.scale_step, page, table.pages, key_start, table.last_key, FIXED.PAGE,
        FIXED.TILE, layout,
    )  # fmt: skip
    other = token_plane(
        pages.rotary_scale, pages.rotary_scale_step, page, table.pages, key_start, table.last_key,
        FIXED.PAGE, FIXED.TILE, layout,
    )  # fmt: skip
    return scale, other


@gluon.jit
def copy_tile(rings, stage, pages, page, table, key_start, FIXED: gl.constexpr):
    """Ask for a tile's codes."""
    WORDS: gl.constexpr = rings.rows.shape[2]
    ROTARY_WORDS: gl.constexpr = rings.rotary.shape[2]
    copy_codes(
        rings.rows.index(stage), pages.codes, pages.step, page, table.pages, key_start,
        table.last_key, FIXED.PAGE, FIXED.TILE, WORDS,
        copy_layout(WORDS, gl.int32, gl.num_warps()),
    )  # fmt: skip
    copy_codes(
        rings.rotary.index(stage), pages.rotary_codes, pages.rotary_step, page, table.pages,
        key_start, table.last_key, FIXED.PAGE, FIXED.TILE, ROTARY_WORDS,
        copy_layout(ROTARY_WORDS, gl.int32, gl.num_warps()),
    )  # fmt: skip
