"""Keys and queries of unlike directions, and what rounding them loses."""

import torch

from quantpage.formats import CODES, FORMATS, Granularity, QuantSpec, dequantize, quantize, rotate
from quantpage.formats.feedback import quantize_with_feedback, with_feedback
from quantpage.formats.key_statistics import KeyStatistics

SPECS = {
    "int8": FORMATS["int8"].key,
    "int4": FORMATS["int4"].key,
    "int3": FORMATS["int3"].key,
    "groups": QuantSpec(CODES["int4"], Granularity(group=16), zero_point=True, rotation="hadamard"),
}


def statistics(seed, tokens=600, head_dim=32):
    """Keys and queries, each with few large directions of their own."""
    shape, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    sizes = 0.8 ** torch.arange(head_dim)
    q, k = (
        torch.randn(tokens, heads, head_dim, generator=noise)
        * sizes
        @ torch.randn(head_dim, head_dim, generator=shape)
        for heads in (4, 2)
    )
    return KeyStatistics.of(q, k + 5.0)


def lost(found, spec, key_map, feedback=True, by=None):
    """Sum of e' W e over the keys that were kept, rounded in turn, ``by`` whose metric, or each
    channel by itself.
    """
    by = with_feedback(key_map, (by or found).metric, rotated=True).feedback
    given = rotate(key_map.keys(found.keys))
    codes = quantize_with_feedback(given, spec, by) if feedback else quantize(given, spec)
    error = key_map.restored(rotate(dequantize(*codes, spec))) - found.keys
    error = error.double()
    return torch.einsum("thi,hij,thj->h", error, found.metric, error)
