"""What attention is asked to compute."""

import pytest

from quantpage.masks import CausalMask, FullMask, Mask
from quantpage.ops.attend.params import causal_or_full

pytestmark = pytest.mark.pure


class Odd(Mask):
    """Calls itself causal, and is not."""

    kind = "causal"

    def visible(self, queries, keys, request=0, kv_head=0):
        return (keys[None] <= queries[:, None]) & (keys[None] % 2 == 1)

    def key_range(self, first_query, last_query, keys, request=0):
        return 0, keys


def test_a_mask_that_calls_itself_causal_goes_to_no_kernel_that_has_the_rule_compiled_in():
    for mask in (CausalMask(window=3), FullMask()):
        assert causal_or_full(mask) is mask
    with pytest.raises(ValueError, match="expected a CausalMask or a FullMask, got Odd"):
        causal_or_full(Odd())
