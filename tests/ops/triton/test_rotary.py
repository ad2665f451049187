"""Rotary embeddings of a model against Transformers' own."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quantpage.ops.triton.rotary import serves, turn_heads
from tests.ops.triton_cases import DEVICE, TIER

pytestmark = TIER


def _heads(rows, heads, new, dim, dtype, seed):
    """As a projection leaves them: [rows, heads, new, dim] over [rows, new, heads * dim]."""
    made = torch.randn(rows, new, heads, dim, generator=torch.Generator().manual_seed(seed))
    return made.to(dtype).to(DEVICE).transpose(1, 2)


def _angles(rows, new, dim, dtype):
    """Of unlike halves, which Llama's are not: nothing may take one for the other."""
    made = torch.Generator().manual_seed(rows)
    angles = 50 * torch.randn(rows, new, dim, generator=made)
    return angles.cos().to(dtype).to(DEVICE), angles.sin().to(dtype).to(DEVICE)


def _same(got, wanted):
    """To the bit; but Triton's interpreter cuts off where it makes bfloat16 of float32."""
    if got.dtype == torch.bfloat16 and DEVICE == "cpu":
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.05)
        return True
    return torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(
    ("rows", "new", "q_heads", "k_heads"), [(1, 5, 9, 3), (3, 1, 4, 4), (2, 3, 8, 1)]
)
def test_heads_turn_as_in_transformers_to_the_bit(dtype, dim, rows, new, q_heads, k_heads):
    q, k = _heads(rows, q_heads, new, dim, dtype, 1), _heads(rows, k_heads, new, dim, dtype, 2)
    cos, sin = _angles(rows, new, dim, dtype)
    assert serves(q, k, cos, sin)
    for got, wanted in zip(
        turn_heads(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert got.transpose(1, 2).is_contiguous()
        assert _same(got, wanted)


def test_angles_may_be_the_same_for_all_rows():
    q, k = _heads(3, 4, 6, 64, torch.bfloat16, 1), _heads(3, 2, 6, 64, torch.bfloat16, 2)
    cos, sin = _angles(1, 6, 64, torch.bfloat16)
    for given in ((cos, sin), (cos.expand(3, -1, -1), sin.expand(3, -1, -1))):
        for got, wanted in zip(
            turn_heads(q, k, *given), apply_rotary_pos_emb(q, k, cos, sin), strict=True
        ):
            assert _same(got, wanted)


def test_heads_may_lie_inside_of_a_wider_projection():
    mixed = torch.randn(2, 5, 8, 64, device=DEVICE).to(torch.bfloat16)
    q, k = mixed[:, :, :6].transpose(1, 2), mixed[:, :, 6:7].transpose(1, 2)
    before, (cos, sin) = mixed.clone(), _angles(2, 5, 64, torch.bfloat16)
    for got, wanted in zip(
        turn_heads(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert _same(got, wanted)
    assert torch.equal(mixed, before)


def test_no_tokens_are_no_launch():
    q, k = _heads(1, 4, 0, 64, torch.bfloat16, 1), _heads(1, 2, 0, 64, torch.bfloat16, 2)
    got = turn_heads(q, k, *_angles(1, 0, 64, torch.bfloat16))
    assert [each.shape for each in got] == [q.shape, k.shape]


def test_what_rounds_otherwise_is_left_to_the_model():
    q, k = _heads(2, 4, 3, 64, torch.bfloat16, 1), _heads(2, 2, 3, 64, torch.bfloat16, 2)
    cos, sin = _angles(2, 3, 64, torch.bfloat16)
    wide = [each.float() for each in (q, k, cos, sin)]
    shifted = torch.randn(2 * 4 * 3 * 64 + 1, device=DEVICE).to(torch.bfloat16)[1:]
    for given in (
        wide,
        (q, k, cos.float(), sin.float()),
        (q, k, cos[..., :32], sin[..., :32]),
        (q, k, cos[:, :2], sin[:, :2]),
        (q, k.transpose(-1, -2), cos, sin),
        (shifted.view(2, 4, 3, 64), k, cos, sin),
    ):
        assert not serves(*given)
