"""What a mutation is, and what those of several areas share."""

from dataclasses import dataclass

SRC = "src/quantpage/"
OPS, HF = SRC + "ops/", SRC + "integrations/hf_transformers/"
TORCH, CORE = "--only torch --cases 150 --seed 1", "--only cpu --cases 25 --seed 1"
"""What finds most of what the fuzz has to find."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """A text of a file, what stands there instead, and who has to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """pytest arguments, of which at least one test has to fail."""
    fuzz: str = ""
    """Arguments of scripts/fuzz.py that have to find it as well; empty: not its matter."""
