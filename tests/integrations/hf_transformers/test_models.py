"""Some families of scripts/sweep_models.py: what each does attached, and that it says so."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.sweep_models import read

pytestmark = pytest.mark.cpu

EXPECTED = {
    ("causal", "llama"): ("kernels", ""),
    ("causal", "gemma2"): ("kernels", ""),
    ("causal", "gpt2"): ("kernels", ""),
    ("causal", "gpt_oss"): ("kernels", ""),
    ("causal", "llama4_text"): ("kernels", ""),
    ("image-text", "blip"): ("refused", "keys of pictures among those of its text"),
    ("image-text", "gemma3"): ("kernels", ""),
    ("image-text", "qwen2_5_vl"): ("kernels", ""),
    ("causal", "qwen3_next"): ("partly", "a state of their own"),
    ("causal", "falcon_h1"): ("partly", "a state of their own"),
    ("causal", "recurrent_gemma"): ("partly", "a state of their own"),
    ("causal", "bloom"): ("dense", "its own code"),
    ("causal", "deepseek_v2"): ("kernels", "latent rows"),
    ("causal", "deepseek_v3"): ("kernels", "latent rows"),
    ("causal", "glm4_moe_lite"): ("kernels", "latent rows"),
    ("causal", "minicpm3"): ("kernels", "latent rows"),
    ("causal", "youtu"): ("kernels", "latent rows"),
    ("causal", "kimi_linear"): ("partly", "latent rows"),
    ("image-text", "mistral4"): ("kernels", "latent rows"),
    ("causal", "mamba"): ("refused", "no attention heads"),
    ("causal", "deepseek_v32"): ("refused", "Indexed"),
    ("causal", "cpmant"): ("refused", "tokens of its own"),
    ("causal", "prophetnet"): ("refused", "reads padding"),
    ("causal", "xlm"): ("refused", "a cache of its own"),
}
"""Verdict, and a part of what is said."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    table = tmp_path_factory.mktemp("models") / "models.csv"
    script = Path(__file__).parents[3] / "scripts" / "sweep_models.py"
    only = ",".join(dict.fromkeys(model_type for _, model_type in EXPECTED))
    done = subprocess.run(
        [sys.executable, script, "--only", only, "--out", table, "-v"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert table.is_file(), done.stderr
    return {(row.kind, row.model_type): row for row in read(table)}


@pytest.mark.parametrize("family", EXPECTED, ids=lambda each: " ".join(each))
def test_a_family_is_right_or_refused_and_says_how(rows, family):
    verdict, said = EXPECTED[family]
    row = rows[family]
    assert row.verdict == verdict, row
    assert said in row.coverage + row.why, row
