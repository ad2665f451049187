"""What the functions of a Hopper kernel give each other, by name.

A record costs no instruction: its fields are values like any others, or constants. (A constant in a
NamedTuple that is given a name becomes a value: what is compiled in is a dataclass, one constant.)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon


@dataclass(frozen=True, slots=True)
class Fixed:
    """What is compiled in, by the names of triton_kernel.decode_kernel."""

    K_CODE: int
    V_CODE: int
    K_SCALES: int
    V_SCALES: int
    K_ZERO: bool
    V_ZERO: bool
    K_SHARED: int
    V_SHARED: int
    HEAD_DIM: int
    VALUE_DIM: int
    GROUP: int
    PAGE: int
    ROWS: int
    ROW_TILES: int
    TILE: int
    FULL: bool
    WINDOW: bool
    SEGMENT: int
    SOFTCAP: bool
    SINKS: bool
    STAGES: int
    PIECES: bool


@gluon.constexpr_function
def fixed_of(*given):
    """In the order of Fixed."""
    return Fixed(*given)


class Share(NamedTuple):
    """A program's share of the line of all tiles (triton_share.my_share)."""

    start: Any
    end: Any
    share: Any
    request: Any
    begins: Any
    even: Any


class Step(NamedTuple):
    """The step's requests, and what their queries see."""

    query_starts: Any
    context_lens: Any
    kv_heads: Any
    window: Any
    sink_tokens: Any


class Queries(NamedTuple):
    """Queries where they lie, and what scores are multiplied by and held under."""

    q: Any
    token: Any
    head: Any
    scale: Any
    softcap: Any


class OfChannels(NamedTuple):
    """Scales and zeros, which belong to channels where they are given."""

    k_scale: Any
    v_scale: Any
    k_zero: Any
    v_zero: Any
    k_head: Any
    v_head: Any


class Rows(NamedTuple):
    """A tile of query rows of one request and kv_head."""

    first: Any
    """Of the request's rows."""
    q_start: Any
    q_len: Any
    head: Any
    request: Any
    item: Any
    """Which tile of the request, heads counted."""


class Part(NamedTuple):
    """What of a row's tiles a program had, and where that lies in the line."""

    first_tile: Any
    last_tile: Any
    tiles: Any
    """Of the whole row."""
    position: Any
    row_start: Any
    lead: Any


class Results(NamedTuple):
    """Where rows go: to the results, or to pieces."""

    out: Any
    lse: Any
    part_out: Any
    part_lse: Any
    cuts: Any
    sinks: Any
    out_token: Any
    out_head: Any
