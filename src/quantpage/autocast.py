"""Arithmetic in the dtypes that the code names, also inside a caller's ``torch.autocast``.

Autocast rounds the operands of every matrix product of torch to 16 bits. Scores, rotations and key
maps are float32 on purpose, and codes that depend on who called would not be those of another call.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
Result = TypeVar("Result")

_KINDS = ("cpu", "cuda")


def in_own_dtypes(function: Callable[P, Result]) -> Callable[P, Result]:
    """``function`` with autocast off while it runs."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        on = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
        if not on:
            return function(*args, **kwargs)
        with ExitStack() as off:
            for kind in on:
                off.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run
