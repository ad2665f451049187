"""Pages of a window that were given back: no mask may show them."""

import pytest
import torch

from quantpage.batch import plan_batch
from quantpage.cache import LayerKV, QuantizedPages
from quantpage.formats import CODES, QuantSpec
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams, torch_blockwise

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("window", "right"), [(None, False), (18, False), (17, True)])
def test_a_mask_shows_no_page_that_was_given_back(window, right):
    plan = plan_batch([1], [49], [[0, 0, 2, 3]], 16, first_pages=[2])
    pages = QuantizedPages(QuantSpec(CODES["none"]), torch.zeros(4, 1, 16, 64))
    params = AttendParams(1.0, CausalMask(window=window))
    given = torch.zeros(1, 1, 64), LayerKV(pages, pages), plan, params
    if right:
        torch_blockwise.attend(*given)
        return
    with pytest.raises(ValueError, match=r"first_pages\[0\]: expected at most"):
        torch_blockwise.attend(*given)
