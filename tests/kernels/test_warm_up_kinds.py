"""Every kernel that steps of a server ask for is one that the warm-up has asked for."""

import pytest

from tests.kernels.apart import compile_apart

pytestmark = pytest.mark.cpu


def test_steps_of_a_server_ask_for_nothing_else():
    found = compile_apart("tests.kernels.warm_up_case")
    assert len(found) == 3
    for name, (kernels, more) in found.items():
        assert kernels > 20, name
        assert not more, name
