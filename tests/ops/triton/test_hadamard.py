"""The rotation kernel against formats/rotate, in place, for whole and partial blocks."""

import pytest
import torch

from quantpage.formats import rotate
from quantpage.ops.triton.hadamard import rotate_in_place
from tests.ops.triton_cases import DEVICE, TIER

pytestmark = TIER


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 700])
def test_rotates_every_row_as_torch_does(head_dim, dtype, tokens):
    if DEVICE == "cpu" and tokens > 7:
        pytest.skip("the interpreter is slow: many rows only on a device")
    x = torch.randn(tokens, 9, head_dim, device=DEVICE).to(dtype)
    wanted = rotate(x.clone())
    got = rotate_in_place(x)
    assert got.data_ptr() == x.data_ptr()
    torch.testing.assert_close(got, wanted)


def test_refuses_rows_that_do_not_follow_each_other():
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        rotate_in_place(torch.randn(4, 8, 64, device=DEVICE).transpose(0, 1))
