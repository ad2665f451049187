"""What device a tensor lives on, read once per device and never at import.

Dispatch asks ``device_info`` instead of calling torch.cuda in many places: importing
quantpage must not start CUDA, and a refusal should be able to say what it found.
"""

import platform
import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from quantpage.errors import Unavailable

E4M3 = (8, 9)
"""The first compute capability with instructions that convert e4m3."""
HOPPER = (9, 0)
"""The first with wgmma, TMA and launches that begin before the one they follow has ended."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Facts about one device that decide which implementation can run on it."""

    kind: str
    """'cpu' or 'cuda'."""
    name: str
    """What the vendor calls it."""
    capability: tuple[int, int] | None
    """CUDA compute capability, (9, 0) for Hopper; None off CUDA."""
    processors: int
    """Streaming multiprocessors, or CPU threads that torch may use."""
    shared_bytes: int = 0
    """Shared memory that one program of a kernel may have; 0 where unknown."""

    def since(self, capability: tuple[int, int]) -> bool:
        """Whether it is a CUDA device of this compute capability or a later one."""
        return self.capability is not None and self.capability >= capability

    def before(self, capability: tuple[int, int]) -> bool:
        """Whether it is a CUDA device of an earlier one."""
        return self.capability is not None and self.capability < capability


def find_device(name: str) -> torch.device:
    """The device that a flag names: 'auto', 'cpu', 'cuda' or 'cuda:N'.

    auto: a CUDA device where there is one. Raises ValueError for another name, Unavailable for a
    CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N; got {name!r}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match.group(1) or 0) >= found:
        built = "" if torch.version.cuda else "; this torch is built without CUDA"
        raise Unavailable(f"device: expected one of {found} CUDA devices, got {name}{built}")
    return torch.device(name)


def device_info(device: torch.device | str) -> DeviceInfo:
    """Facts about ``device``; the CPU's thread count is read anew, the rest once."""
    device = torch.device(device)
    if device.type == "cpu":
        return DeviceInfo("cpu", _cpu_name(), None, torch.get_num_threads())
    if device.type == "cuda":
        return _cuda_info(torch.cuda.current_device() if device.index is None else device.index)
    return DeviceInfo(device.type, device.type, None, 0)


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """What a process may still take of a device's memory; None: unknown.

    On a CPU of the machine, and of its group where that is less.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    found.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    try:
        with (
            open("/sys/fs/cgroup/memory.max") as most,
            open("/sys/fs/cgroup/memory.current") as now,
        ):
            limit = most.read().strip()
            if limit != "max":
                found.append(max(0, int(limit) - int(now.read())))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def upload(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``host`` on ``device``; a GPU copies it in the current stream, and nobody waits for it.

    Inside a capture nothing is uploaded without a wait: the graph would read memory of then.
    """
    device = torch.device(device)
    if device.type != "cuda" or host.is_cuda or torch.cuda.is_current_stream_capturing():
        return host.to(device)
    # From memory that the device reads by itself; torch keeps it until the copy is done.
    return host.pin_memory().to(device, non_blocking=True)


@lru_cache
def _cuda_info(index: int) -> DeviceInfo:
    found = torch.cuda.get_device_properties(index)
    return DeviceInfo(
        "cuda",
        found.name,
        (found.major, found.minor),
        found.multi_processor_count,
        # Not in every torch.
        getattr(found, "shared_memory_per_block_optin", 0),
    )


@lru_cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
