"""Attention outputs back from the basis of a rotated cache."""

from jaxtyping import Float
from torch import Tensor

from quantpage.formats import rotate
from quantpage.ops.refusals import installed


def rotate_output(
    out: Float[Tensor, "tokens q_heads value_dim"],
) -> Float[Tensor, "tokens q_heads value_dim"]:
    """``formats.rotate`` of a result that nobody else holds: on a GPU it is overwritten."""
    if out.is_cuda and installed("triton"):
        from quantpage.ops.triton.hadamard import rotate_in_place

        return rotate_in_place(out)
    return rotate(out)
