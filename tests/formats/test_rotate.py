"""The Hadamard rotation: orthonormal, its own inverse, and what it is for."""

import pytest
import torch

from quantpage.formats import CODES, QuantSpec, dequantize, hadamard_matrix, quantize, rotate
from quantpage.formats.rotate import rotation_block

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("head_dim", "block"), [(1, 1), (63, 1), (64, 64), (80, 16), (96, 32), (128, 128), (576, 64)]
)
def test_blocks_are_the_largest_power_of_two(head_dim, block):
    assert rotation_block(head_dim) == block


@pytest.mark.parametrize("size", [1, 2, 16, 64, 256])
def test_the_matrix_is_symmetric_and_orthonormal(size):
    matrix = hadamard_matrix(size, torch.float64, torch.device("cpu"))
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    assert matrix.abs().unique().numel() == 1


def test_the_matrix_is_sylvesters():
    matrix = hadamard_matrix(4, torch.float64, torch.device("cpu")) * 2
    assert matrix.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_rotating_twice_changes_nothing_and_products_are_kept(head_dim):
    q, k = torch.randn(2, 5, 3, head_dim, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(q)), q)
    torch.testing.assert_close((rotate(q) * rotate(k)).sum(-1), (q * k).sum(-1))
    assert not torch.allclose(rotate(q), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rotated_in_float32(dtype):
    x = torch.randn(4, 64).to(dtype)
    assert rotate(x).dtype == dtype
    assert torch.equal(rotate(x), rotate(x.float()).to(dtype))


def test_an_outlier_channel_is_spread():
    """What rotation is for: with one loud channel, 4-bit codes keep the quiet ones."""
    spec = QuantSpec(CODES["int4"], zero_point=True)
    x = torch.randn(200, 128)
    x[:, 5] += 60
    seen = dequantize(*quantize(x, spec), spec)
    turned = rotate(dequantize(*quantize(rotate(x), spec), spec))
    quiet = torch.arange(128) != 5
    plain_error = (seen - x)[:, quiet].pow(2).mean()
    assert (turned - x)[:, quiet].pow(2).mean() < plain_error / 2
