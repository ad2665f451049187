"""Kernels that a program will launch, compiled side by side before it does.

A launch compiles its kernel where none is compiled, and waits for it. Within ``compile_ahead``
launches only say what they need. At its end processes compile that into Triton's cache on disk, as
a third of a compilation is Python's; threads then load it from there.
"""

import gc
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
"""Processes, and threads."""
_PATIENCE = 120.0
"""Seconds for all processes; what one that is killed has not done, the threads do."""


class _Later(Executor):
    """Keeps what it is given until ``run``."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.append((future, fn))
        return future

    def run(self, device: int) -> None:
        """All that was given; a kernel is also built into what can be launched."""

        def work(job: tuple[Future[Any], Callable[[], Any]]) -> None:
            future, compile_fn = job
            try:
                # In a thread that has no device yet.
                driver.active.set_current_device(device)
                kernel = compile_fn()
                kernel._init_handles()
            except Exception as error:  # noqa: BLE001  whoever launches it hears of it
                future.set_exception(error)
            else:
                future.set_result(kernel)

        workers = min(_MOST, os.cpu_count() or 1, len(self._jobs))
        if workers > 1 and hasattr(os, "fork"):
            _compile_apart([compile_fn for _, compile_fn in self._jobs], workers)
        with ThreadPoolExecutor(max(workers, 1), "quantpage-compile") as threads:
            for _ in threads.map(work, self._jobs):
                pass


class _Ahead(AsyncCompileMode):
    """Triton's mode, whose kernels launches find before they are there."""

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]):
        found = super().submit(key, compile_fn, finalize_fn)
        # To be asked again takes a launch a millisecond. Who runs it waits for its result, or
        # hears why there is none.
        finalize_fn(found)
        return found


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

    later = _Later()
    mode = _Ahead(later, ignore_errors=True)
    with mode:
        JITFunction.run = compile_only
        try:
            yield lambda: len(mode.future_kernels)
        finally:
            JITFunction.run = run
            # Whatever ended the block: launches of other threads may be waiting.
            later.run(driver.active.get_current_device())


def _compile_apart(jobs: list[Callable[[], Any]], workers: int) -> None:
    """Compile in forks of this process, which ask nothing of its device."""
    read, write = os.pipe()
    # Who is free takes the next; a pipe holds 65,536 bytes.
    os.write(write, b"".join(at.to_bytes(2, "little") for at in range(min(len(jobs), 1 << 15))))
    os.close(write)
    children = []
    for _ in range(workers):
        with warnings.catch_warnings():
            # Of threads whose locks a fork would never see released: it takes none of theirs, and
            # is not waited for without end.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _compile_and_exit(jobs, read)
        children.append(child)
    os.close(read)
    end = time.monotonic() + _PATIENCE
    for child in children:
        with suppress(ChildProcessError):
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.01)


def _compile_and_exit(jobs: list[Callable[[], Any]], read: int) -> None:
    """In a fork."""
    try:
        # Tensors of the device are not this process's to free.
        gc.disable()
        while at := os.read(read, 2):
            with suppress(Exception):
                kernel = jobs[int.from_bytes(at, "little")]()
                # Its launcher is C code, compiled a kernel too.
                driver.active.launcher_cls(kernel.src, kernel.metadata)
    finally:
        os._exit(0)
