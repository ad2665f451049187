"""The affine map of keys: what it must not change, and what it refuses."""

import pytest
import torch

from quantpage.formats import KeyMap, rotate

pytestmark = pytest.mark.pure


def made(kv_heads=2, head_dim=8, mean=True, turned=False):
    scale = (torch.rand(kv_heads, head_dim) + 0.5) * torch.randn(kv_heads, head_dim).sign()
    turn = torch.eye(head_dim) + 0.2 * torch.randn(kv_heads, head_dim, head_dim)
    mean = torch.randn(kv_heads, head_dim) * 50 if mean else None
    return KeyMap(scale, mean, turn=turn if turned else None)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_products_lose_only_what_is_left_out(mean, rotated, turned):
    torch.manual_seed(0)
    mapped = made(mean=mean, turned=turned)
    q, k = torch.randn(5, 6, 8).double(), torch.randn(5, 2, 8).double()
    turn = rotate if rotated else (lambda x: x)
    q_in, k_in = turn(mapped.queries(q)), turn(mapped.keys(k))
    whole = torch.einsum("thd,thd->th", q, k.repeat_interleave(3, 1))
    left = torch.einsum("thd,thd->th", q_in, k_in.repeat_interleave(3, 1))
    missing = mapped.left_out(q_in, rotated)
    assert (missing is None) == (not mean)
    # Inverses of 32 bits.
    exact = 1e-2 if turned else 1e-4
    torch.testing.assert_close(
        left + (0 if missing is None else missing), whole, atol=exact, rtol=0
    )
    torch.testing.assert_close(mapped.restored(mapped.keys(k)), k, atol=1e-5, rtol=1e-4)


def test_shards_and_digests():
    mapped = made(kv_heads=4)
    part = mapped.heads(1, 3)
    assert torch.equal(part.scale, mapped.scale[1:3]) and torch.equal(part.mean, mapped.mean[1:3])
    assert mapped.digest() == mapped.to("cpu").digest() != part.digest()
    assert KeyMap(mapped.scale).digest() != mapped.digest()
    turned = made(kv_heads=4, turned=True)
    assert turned.digest() != KeyMap(turned.scale, turned.mean).digest()
    shard = turned.heads(1, 3)
    assert torch.equal(shard.turn, turned.turn[1:3])
    assert torch.equal(shard.unturn, turned.unturn[1:3])
    with pytest.raises(ValueError, match="first, last: expected a range"):
        mapped.heads(3, 5)


@pytest.mark.parametrize(
    "scale, mean, said",
    [
        (torch.zeros(2, 4), None, "scale: expected numbers other than 0, got 0.0"),
        (torch.ones(2, 4).double(), None, "scale: expected a contiguous float32 tensor"),
        (torch.ones(4), None, r"got torch.float32 of shape \(4,\)"),
        (torch.ones(2, 4), torch.full((2, 4), torch.nan), r"mean\[0, 0\]: expected finite"),
        (
            torch.ones(2, 4),
            torch.zeros(1, 4),
            r"mean: expected a contiguous float32 tensor \[2, 4\], got",
        ),
        (torch.ones(4, 2).T, None, "scale: expected a contiguous"),
    ],
)
def test_impossible_maps_say_what_is_wrong(scale, mean, said):
    with pytest.raises(ValueError, match=said):
        KeyMap(scale, mean)


def test_a_turn_needs_an_inverse():
    flat = torch.eye(4).repeat(2, 1, 1)
    flat[1, 2] = 0.0
    with pytest.raises(ValueError, match=r"turn: expected matrices with an inverse.* kv_head 1"):
        KeyMap(torch.ones(2, 4), turn=flat)
    with pytest.raises(ValueError, match=r"turn: expected a contiguous float32 tensor \[2, 4, 4\]"):
        KeyMap(torch.ones(2, 4), turn=flat[:1])
