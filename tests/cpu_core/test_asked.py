"""Python objects that are asked for before they are looked at."""

import gc
import sys
from array import array

import pytest
import torch

from quantpage import cpu_core
from quantpage.cpu_core.asked import Asked

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(cpu_core.find_core() is None, reason=cpu_core.absence() or "-"),
]


def test_an_address_may_be_anything():
    lines = array("Q", [0, 1, 63, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
    address, count = lines.buffer_info()
    assert cpu_core.core().fetch(address, count) == 0


def test_objects_that_are_gone_do_no_harm():
    parts = [torch.ones(100 + i) for i in range(50)]
    tables = [{f"{i} {j}": j for j in range(20)} for i in range(50)]
    asked = Asked(parts, tables)
    asked.fetch()
    del parts, tables
    gc.collect()
    asked.fetch()


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="an id is no address")
def test_what_is_asked_for():
    weight, table, other = torch.nn.Parameter(torch.ones(8)), {"a": 1}, object()
    lines = set(Asked([weight, None, other], [table])._lines)
    inner = {weight._cdata, weight.untyped_storage()._cdata}
    assert lines >= {id(weight), id(None), id(other), id(table), *inner}
    # The table's entries lie elsewhere, and where they lie changes as it grows.
    grown = dict(table, **{str(i): i for i in range(100)})
    entries = [set(Asked([], [each])._lines) - {id(each)} for each in (table, grown)]
    assert all(entries) and entries[0].isdisjoint(entries[1])
