"""Kept caches in any order of operations: scripts/sweep_caches.py, which tries more seeds."""

import pytest

from scripts.sweep_caches import try_seed

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("name", "seed"), [("llama", 0), ("gemma3_window", 1), ("mistral_window", 2)]
)
def test_any_order(name, seed, tmp_path):
    assert try_seed(name, seed, tmp_path) > 15
