"""Rotary embedding against the complex-number definition."""

import pytest
import torch

from quantpage.rope import apply_rope, rope_table

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 32, 2])
def test_rotation_is_multiplication_by_a_complex_unit(interleaved, rotary_dim):
    x, positions = torch.randn(5, 3, 64, dtype=torch.float64), torch.tensor([0, 1, 7, 100, 511])
    out = apply_rope(x, positions, rope_table(512, rotary_dim, 1e4, interleaved))
    half = rotary_dim // 2
    if interleaved:
        pairs = torch.complex(x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2])
    else:
        pairs = torch.complex(x[..., :half], x[..., half:rotary_dim])
    steps = 1e4 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    turned = pairs * torch.exp(1j * positions[:, None, None] * steps)
    first, second = turned.real, turned.imag
    if interleaved:
        wanted = torch.stack([first, second], -1).flatten(-2)
    else:
        wanted = torch.cat([first, second], -1)
    torch.testing.assert_close(out[..., :rotary_dim], wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(out[..., rotary_dim:], x[..., rotary_dim:])


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 64, dtype=torch.float64), torch.randn(1, 1, 64, dtype=torch.float64)
    table = rope_table(512, 64)

    def score(i, j):
        return (
            apply_rope(q, torch.tensor([i]), table) * apply_rope(k, torch.tensor([j]), table)
        ).sum()

    torch.testing.assert_close(score(10, 3), score(310, 303), atol=1e-5, rtol=1e-5)


def test_an_odd_rotary_dim_is_refused():
    with pytest.raises(ValueError, match="rotary_dim: expected an even number"):
        rope_table(8, 7)
