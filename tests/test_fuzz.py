"""Drawn cases of the public API against an oracle of its own: scripts/fuzz.py, which tries more.

A failure's line begins with what reproduces it: --seed, --case, and --only with its kind.
"""

import pytest
import torch

from scripts.fuzzing.run import kinds_here, run_cases

SEED, CHUNK = 20261127, 20


@pytest.mark.cpu
@pytest.mark.parametrize("first", range(0, 200, CHUNK))
def test_drawn_cases_agree_with_the_oracle(first):
    kinds = kinds_here(interpreter=False)
    tally = run_cases(SEED, range(first, first + CHUNK), kinds)
    assert not tally.failed, "\n".join(tally.failed)
    # Every case is one that somebody serves here.
    assert tally.passed.total() == CHUNK, tally.refused


@pytest.mark.interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not interpreted")
def test_drawn_cases_of_interpreted_kernels():
    tally = run_cases(SEED, range(4), ("triton",))
    assert not tally.failed, "\n".join(tally.failed)
    assert tally.passed.total() >= 2, tally.refused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_drawn_cases_on_a_gpu():
    tally = run_cases(SEED, range(200), ("cuda",))
    assert not tally.failed, "\n".join(tally.failed)
    assert tally.passed.total() >= 150, tally.refused
