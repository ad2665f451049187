"""What importing costs, and who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import quantpage

pytestmark = pytest.mark.pure
SOURCE = Path(quantpage.__file__).parent


def test_importing_starts_nothing():
    code = (
        "import sys, quantpage, quantpage.attention, quantpage.explain, quantpage.cache\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([m for m in ('triton', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_kernels_import_triton():
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else node.names)
        if str(getattr(name, "name", name)).split(".")[0] == "triton"
    }
    kernels = ("triton", "gluon")
    strays = {
        name
        for name in found
        if not (name.startswith("ops/") and Path(name).name.startswith(kernels))
        and not name.startswith("ops/triton/")
        and not name.startswith("bench/")
    }
    assert strays == set()


def test_the_public_surface_is_what_it_says():
    assert quantpage.__all__ == sorted(quantpage.__all__)
    for name in quantpage.__all__:
        assert getattr(quantpage, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'flash_attention'"):
        quantpage.flash_attention  # noqa: B018
