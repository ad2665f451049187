"""What a device is asked for: at least, or before, a compute capability; none of it off CUDA."""

import pytest

from quantpage.explain import DEVICES
from quantpage.hardware import E4M3, HOPPER

pytestmark = pytest.mark.pure


def test_capabilities_are_those_of_cuda_devices():
    hopper, cpu = DEVICES["Hopper"], DEVICES["CPU"]
    assert hopper.since(E4M3) and hopper.since(HOPPER) and not hopper.since((10, 0))
    assert hopper.before((9, 1)) and not hopper.before(HOPPER)
    assert not cpu.since((0, 0)) and not cpu.before((99, 0))
    for other in DEVICES.values():
        assert other.since(E4M3) != other.before(E4M3) or other.capability is None
