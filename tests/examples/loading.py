"""Scripts of examples/ as modules."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def example(name):
    """A fresh module of the script, which is not run as a program."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
