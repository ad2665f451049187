"""Segments and the exact-page rule for kernels: attend/params in Triton.

Gluon kernels call these too: nothing here needs a layout of its own.
"""

import triton

# The interpreter looks for it beside every kernel.
import triton.language as tl  # noqa: F401

from quantpage.ops.attend.params import NEAR_PAGES, SEGMENTS
from quantpage.ops.triton.common import Constant

ALL_KEYS = Constant(SEGMENTS["all"])
BODY_KEYS = Constant(SEGMENTS["body"])
EXACT_KEYS = Constant(SEGMENTS["exact"])

NEAR = Constant(NEAR_PAGES)
"""Pages before its own that a query sees exactly."""


@triton.jit
def exact_pairs(queries, keys, page_size):
    """Which keys a query sees exactly; queries and keys broadcast (params.exact_pairs)."""
    near = near_pairs(queries, keys, page_size)
    return (keys < page_size) | near


@triton.jit
def near_pairs(queries, keys, page_size):
    """``exact_pairs`` where no key is of the first page."""
    behind = queries // page_size - keys // page_size
    return (behind >= 0) & (behind <= NEAR)


@triton.jit
def near_page(query, page_size):
    """From this page to its own a query sees keys exactly; below 0 in the first pages.

    A causal query's body keys lie between the first page and this one.
    """
    return query // page_size - NEAR


@triton.jit
def near_queries(keys, page_size):
    """Half-open range of the queries to which a key is near, whichever page it is in."""
    own = keys // page_size * page_size
    return own, own + (1 + NEAR) * page_size
