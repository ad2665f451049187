"""The affine map of keys: what it must not change, and what it refuses."""

import pytest
import torch

from quantpage.formats import KeyMap, rotate

pytestmark = pytest.mark.pure


def made(kv_heads=2, head_dim=8, mean=True):
    scale = (torch.rand(kv_heads, head_dim) + 0.5) * torch.randn(kv_heads, head_dim).sign()
    return KeyMap(scale, torch.randn(kv_heads, head_dim) * 50 if mean else None)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_products_lose_only_what_is_left_out(mean, rotated):
    torch.manual_seed(0)
    mapped = made(mean=mean)
    q, k = torch.randn(5, 6, 8).double(), torch.randn(5, 2, 8).double()
    turn = rotate if rotated else (lambda x: x)
    q_in, k_in = turn(mapped.queries(q)), turn(mapped.keys(k))
    whole = torch.einsum("thd,thd->th", q, k.repeat_interleave(3, 1))
    left = torch.einsum("thd,thd->th", q_in, k_in.repeat_interleave(3, 1))
    missing = mapped.left_out(q_in, rotated)
    assert (missing is None) == (not mean)
    torch.testing.assert_close(left + (0 if missing is None else missing), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(mapped.restored(mapped.keys(k)), k)


def test_shards_and_digests():
    mapped = made(kv_heads=4)
    part = mapped.heads(1, 3)
    assert torch.equal(part.scale, mapped.scale[1:3]) and torch.equal(part.mean, mapped.mean[1:3])
    assert mapped.digest() == mapped.to("cpu").digest() != part.digest()
    assert KeyMap(mapped.scale).digest() != mapped.digest()
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
