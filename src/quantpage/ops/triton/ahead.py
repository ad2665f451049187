"""Kernels that a program will launch, compiled side by side before it does.

A launch compiles its kernel where none is compiled, and waits for it. Within ``compile_ahead``
launches only say what they need: threads compile it, of whose work three quarters are the
compiler's and the assembler's, which leave Python to others.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime import JITFunction, driver

try:
    from triton.runtime._async_compile import AsyncCompileMode, active_mode
except ImportError:
    # Triton's own and private: without it kernels are compiled as they are launched.
    AsyncCompileMode = object
    active_mode = None

_MOST = 16
"""Threads: what of a compilation is Python's takes turns."""


class _Ahead(AsyncCompileMode):
    """Triton's mode, in which a kernel is also built into what can be launched, and found by the
    next launch as soon as it is."""

    def __init__(self, executor: Executor, device: int) -> None:
        super().__init__(executor, ignore_errors=True)
        self._device = device

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]):
        found = self.future_kernels.get(key)
        if found is None:
            return super().submit(key, lambda: self._build(compile_fn), finalize_fn)
        if found.future.done():
            found.result(ignore_errors=True)
        return found

    def _build(self, compile_fn: Callable[[], Any]) -> Any:
        """In a thread that has no device yet. The launcher is C code, compiled a kernel too."""
        driver.active.set_current_device(self._device)
        kernel = compile_fn()
        kernel._init_handles()
        return kernel


@contextmanager
def compile_ahead() -> Iterator[Callable[[], int] | None]:
    """Launches of this thread on its current device do not run: what they need is compiled when
    the block ends. Of kernels that do not compile nothing is said: their launches will.

    Yields what counts the kernels that were asked for and not compiled before; None where launches
    run as ever, in Triton's interpreter or where it has no such mode.
    """
    if active_mode is None or triton.knobs.runtime.interpret:
        yield None
        return
    run = JITFunction.run

    def compile_only(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        # The mode is this thread's: others launch as ever.
        ahead = active_mode.get() is not None
        return run(self, *given, grid=grid, warmup=warmup or ahead, **named)

    with ThreadPoolExecutor(min(_MOST, os.cpu_count() or 1), "quantpage-compile") as executor:
        mode = _Ahead(executor, driver.active.get_current_device())
        JITFunction.run = compile_only
        try:
            with mode:
                yield lambda: len(mode.future_kernels)
        finally:
            JITFunction.run = run
