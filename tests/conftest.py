"""Shapes in signatures are checked, every test starts from the same seed, and memory that nobody
wrote is NaN.
"""

import os
import signal

import pytest
import torch

from tests import shapes

# Before anything of the package is imported.
shapes.install()

if not torch.cuda.is_available():
    # Triton reads this when it is first imported: without a device kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """``torch.empty`` hands out NaN, so that a result read from unwritten memory fails."""
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
