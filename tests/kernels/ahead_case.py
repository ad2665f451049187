"""Kernels compiled ahead for a device that is not there: what compiled and what was launched."""

import json
import os
import tempfile
import threading
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from quantpage.ops.triton.ahead import compile_ahead
from quantpage.ops.triton.norm import rms_norm

WIDTHS = (32, 64, 32)


@triton.jit
def broken_kernel(x):
    """A type that is none."""
    tl.static_assert(False)


class Driver:
    """Knows of its device what a compiler asks, and keeps what is launched."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.devices: set[tuple[bool, int]] = set()
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
            load_binary=lambda *given: (object(), object(), 32, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 3

    def set_current_device(self, device: int) -> None:
        self.devices.add((threading.current_thread() is threading.main_thread(), device))

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        name = source.fn.__name__
        return lambda *given: self.launched.append(name)


def norms(widths: tuple[int, ...] = WIDTHS) -> None:
    """A launch a width."""
    for width in widths:
        rms_norm(torch.zeros(2, width), torch.zeros(width), 1e-5)


def main() -> None:
    """What was seen, as JSON."""
    active = Driver()
    driver.set_active(active)
    compiled: list[str] = []
    here: list[bool] = []

    def listen(src, cache_hit, **named) -> None:
        compiled.append(src.fn.__name__)
        here.append(not cache_hit)

    triton.knobs.compilation.listener = listen
    run = triton.runtime.JITFunction.run
    found: dict = {}
    with compile_ahead() as count:
        assert count is not None
        norms()
        broken_kernel[(1,)](torch.zeros(1))
        found["asked for"] = count()
        norms()
        found["asked for again"] = count()
        found["launched within"] = len(active.launched)
        beside = threading.Thread(target=norms, args=((128,),))
        beside.start()
        beside.join()
        found["launched by another thread"] = len(active.launched)
        waits = threading.Thread(target=norms)
        waits.start()
    waits.join()
    found["launched by who waited"] = len(active.launched)
    found["compiled"] = compiled.count("norm_kernel")
    found["compiled here"] = sum(here)
    found["devices"] = sorted(active.devices)
    found["put back"] = triton.runtime.JITFunction.run is run
    norms()
    found["compiled in all"] = compiled.count("norm_kernel")
    found["launched in all"] = len(active.launched)
    try:
        broken_kernel[(1,)](torch.zeros(1))
    except triton.CompilationError:
        found["refused"] = True
    print(json.dumps(found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        main()
