"""Norm and rotary embedding compiled for every target without a GPU."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu


def test_norms_and_rotations_compile_for_every_target():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, "-m", "tests.kernels.parts_case"],
        env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=600,
    )  # fmt: skip
    found = json.loads(said.stdout)
    assert len(found) == 25
    for name, takes in found.items():
        assert takes["stack"] == 0, name
        assert takes["registers"] <= 128, name
        assert takes["shared"] <= 1024, name
        if name.startswith("rotary"):
            # Of a thread's 16 pairs of queries or keys: four products and two sums, each an
            # instruction. A product fused with a sum is not rounded, as Transformers' is.
            assert takes["of 16 bits"] == 2 * 16 * 6, name
        # Whole vectors of 4 or 8 numbers a load.
        assert takes["wide"] > 0, name
