"""Shapes in signatures, checked at every call of a test run (jaxtyping's import hook).

Only tensors' annotations are asked, alone, optional or in a tuple: other types are mypy's.
Kernels' files are left out: their hosts hand over what others have checked.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jaxtyping import AbstractArray, install_import_hook

CHECKED = [
    f"quantpage.{name}"
    for name in ("formats", "cache", "masks", "batch", "rope", "attention", "engine")
] + [
    f"quantpage.ops.{name}"
    for name in (
        "attend.reference", "attend.merge", "attend.params", "attend.torch_blockwise",
        "attend.shown_values", "attend.cpu", "attend.cpu.intervals", "gather.reference",
        "gather.cpu", "rope_write.reference", "rope_write.cpu", "rope_write.params",
        "rotate_output",
    )
]  # fmt: skip


class WrongShape(TypeError):
    """A tensor is not what its annotation says."""


def fits(value: Any, kind: Any) -> bool:
    """Whether a tensor's shape and dtype are as annotated; True for what is no tensor's."""
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return isinstance(value, kind)
    if get_origin(kind) in (Union, UnionType):
        tensors = [each for each in get_args(kind) if has_shape(each)]
        return value is None or not tensors or any(fits(value, each) for each in tensors)
    if get_origin(kind) is tuple and isinstance(value, tuple):
        kinds = get_args(kind)
        return len(kinds) != len(value) or all(map(fits, value, kinds))
    return True


def has_shape(kind: Any) -> bool:
    """Whether a shape is asked for anywhere in an annotation."""
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return True
    return any(has_shape(each) for each in get_args(kind))


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a typechecker that jaxtyping calls within its own bindings of dimensions.

    It asks twice: before a call, of the arguments alone (the return is Any then), and after it, of
    both. Only the second counts: what a function refuses in its own words comes first.
    """
    if function.__annotations__.get("return") is Any:
        return function
    kinds = {name: kind for name, kind in function.__annotations__.items() if has_shape(kind)}
    if not kinds:
        return function
    signature = inspect.signature(function)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in kinds and not fits(value, kinds[name]):
                raise WrongShape(f"{function.__qualname__}, {name}: expected {kinds[name]}, "
                                 f"got {_told(value)}")  # fmt: skip
        found = function(*args, **kwargs)
        if "return" in kinds and not fits(found, kinds["return"]):
            raise WrongShape(f"{function.__qualname__}: expected to return {kinds['return']}, "
                             f"got {_told(found)}")  # fmt: skip
        return found

    return checked


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_told, value))})"
    return f"{getattr(value, 'dtype', type(value).__name__)} {tuple(getattr(value, 'shape', ()))}"


@lru_cache
def install() -> None:
    """From now on; what is imported already stays as it is."""
    install_import_hook(CHECKED, "tests.shapes.check_shapes")
