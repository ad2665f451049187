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


PROMISED = [
    "AttendParams",
    "BACKENDS",
    "BatchPlan",
    "CacheLayout",
    "CausalMask",
    "FORMATS",
    "FullMask",
    "KVFormat",
    "LayerFormats",
    "LayerKV",
    "PagedKVCache",
    "QuantPageCache",
    "QuantPageError",
    "QuantizedPages",
    "WriteParams",
    "__version__",
    "attach",
    "Attached",
    "Attended",
    "BoundAttention",
    "Call",
    "Coverage",
    "Prompts",
    "CurrentStep",
    "LayerAttention",
    "attend",
    "build_attention",
    "device_info",
    "gather",
    "rope_write",
    "find_backend",
    "find_format",
    "plan_batch",
    "plan_on_device",
    "rope_table",
    "load_model",
    "cache_shape",
]
"""Names that users' code may hold; others may join them, none of these may go."""


def test_the_public_surface_is_what_was_promised():
    assert set(PROMISED) <= set(quantpage.__all__)
    assert dir(quantpage) == sorted(quantpage.__all__)
    for name in quantpage.__all__:
        found = getattr(quantpage, name)
        if callable(found):
            assert found.__name__ == name
            assert getattr(sys.modules[found.__module__], name) is found
    assert quantpage.FORMATS["int8"].name == "int8"
    assert quantpage.BACKENDS["flash"].name == "flash"
    with pytest.raises(AttributeError, match="no attribute 'flash_attention'"):
        quantpage.flash_attention  # noqa: B018


def test_type_checkers_see_what_is_loaded():
    """The imports that only they read are the table's, name by name."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {each.name: node.module for node in typed.body for each in node.names}
    packages = dict.fromkeys(quantpage._PACKAGES, "quantpage")
    assert seen == quantpage._PUBLIC | packages


def test_packages_need_no_import_of_their_own():
    code = (
        "import quantpage\n"
        "quantpage.masks.causal(8), quantpage.cache.PagePool(2), quantpage.errors.OutOfPages\n"
        "quantpage.formats.CODES, quantpage.engine.Limits"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_transformers_a_name_says_what_it_needs():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import quantpage; quantpage.FORMATS\n"
        "try: quantpage.attach\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("pip install 'quantpage[transformers]'")
