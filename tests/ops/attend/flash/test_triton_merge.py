"""The merge kernel against attend/merge: empty partials, sinks, poison."""

import pytest
import torch

from quantpage.ops.attend.flash.triton_merge import merge_partials
from quantpage.ops.attend.merge import merge_partials as reference
from tests.ops.triton_cases import DEVICE, TIER

pytestmark = TIER


def partials(count, tokens=7, heads=5, width=80):
    outs = [torch.randn(tokens, heads, width, device=DEVICE) for _ in range(count)]
    lses = [torch.randn(tokens, heads, device=DEVICE) * 5 for _ in range(count)]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        # An empty partial was not promised to be finite.
        lse[i] = -torch.inf
        out[i] = torch.nan
        lse[5] = -torch.inf
        out[5] = torch.nan
    return outs, lses


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("sinks", [False, True])
def test_partials_join(count, sinks):
    outs, lses = partials(count)
    sink = torch.randn(5, device=DEVICE) if sinks else None
    got, got_lse = merge_partials(outs, lses, sink)
    wanted, wanted_lse = reference(outs, lses, sink)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_lse, wanted_lse)
    assert (got[5] == 0).all()


def test_the_first_partial_may_be_the_result():
    outs, lses = partials(2)
    wanted, wanted_lse = reference(outs, lses)
    got, got_lse = merge_partials(outs, lses, out=outs[0], lse=lses[0])
    assert got is outs[0] and got_lse is lses[0]
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_lse, wanted_lse)


def test_large_and_small_logarithms_do_not_overflow():
    outs, lses = partials(2)
    lses[0] += 1e4
    lses[1] += 1e4
    # A float32 logarithm of 1e4 is known to 1e-3: weights must come from differences.
    wanted, _ = reference([o.double() for o in outs], [e.double() for e in lses])
    got, _ = merge_partials(outs, lses)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
