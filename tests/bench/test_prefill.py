"""What the prefill bench makes its layers of."""

import pytest

pytest.importorskip("triton")

from quantpage.batch import plan_batch
from quantpage.bench.cases import PAGE, Case
from quantpage.bench.prefill import exact_tables

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("new", [4 * PAGE, 100])
def test_exact_tables_are_what_a_step_needs_and_no_more(new):
    case = Case(2, 4 * PAGE, new=new)
    lens = (new,) * 2, (4 * PAGE,) * 2
    pages = [[0, 1, 2, 3], [4, 5, 6, 7]]
    exact = exact_tables(case)
    kept = [page for row in exact for page in row if page >= 0]
    assert kept == list(range(len(kept)))
    step = plan_batch(*lens, pages, PAGE, "cpu", exact)
    assert step.exact is not None
    for page in range(4):
        if exact[1][page] >= 0:
            less = [exact[0], [*exact[1][:page], -1, *exact[1][page + 1 :]]]
            with pytest.raises(ValueError, match="exact"):
                plan_batch(*lens, pages, PAGE, "cpu", less)
