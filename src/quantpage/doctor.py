"""What an installation has, whether it computes what it should, and what to do where not: the
findings of `quantpage doctor`.
"""

import os
import platform
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from quantpage import console, cpu_core
from quantpage.hardware import available_bytes, device_info
from quantpage.self_test import Tried, self_test

State = Literal["good", "note", "bad"]
SMALL_MEMORY = 4 << 30
"""Bytes below which a small model and its cache may not fit."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    about: str
    state: State
    """'note': works, but not as well as it could; 'bad': does not work."""
    found: str
    advice: str = ""
    """What to do; empty where nothing has to be done."""


def examine() -> Iterator[Finding]:
    """Everything, the self-test last; nothing is changed and nothing is downloaded."""
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "good", f"{platform.python_version()} on {system}")
    yield _torch()
    yield from _devices()
    yield _core()
    yield _triton()
    yield _package("transformers", "transformers", "loads models: attach, generate, evaluate")
    yield _vllm()
    yield _memory()
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for kind in kinds:
        yield from _self_test(kind)


def _torch() -> Finding:
    return _judged("torch", torch.__version__, _wanted("torch"))


def _devices() -> Iterator[Finding]:
    cpu = device_info("cpu")
    yield Finding("cpu", "good", f"{cpu.name}, {console.counted(cpu.processors, 'thread')}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            info = device_info(f"cuda:{index}")
            free, total = torch.cuda.mem_get_info(index)
            assert info.capability is not None
            major, minor = info.capability
            yield Finding(
                f"cuda:{index}",
                "good" if info.capability >= (8, 0) else "note",
                f"{info.name}, compute capability {major}.{minor}, "
                f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
                "" if info.capability >= (8, 0) else "the kernels are made for 8.0 and later",
            )
        return
    built = torch.version.cuda
    if built is None:
        yield Finding("cuda", "good", "none; this torch is built without CUDA")
    elif shutil.which("nvidia-smi") is None:
        yield Finding("cuda", "good", "none found")
    else:
        yield Finding(
            "cuda",
            "bad",
            f"a driver is installed, but torch (built for CUDA {built}) finds no device",
            "compare the driver's CUDA version in `nvidia-smi` with torch's, and look at "
            "CUDA_VISIBLE_DEVICES",
        )


def _core() -> Finding:
    core = cpu_core.find_core()
    if core is not None:
        return Finding("compiled core", "good", f"runs {cpu_core.ISAS[core.isa]}")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    advice = "pip install --force-reinstall --no-deps quantpage (-e . in a checkout)"
    if compiler is None:
        advice = f"install a C++ compiler (Debian: apt-get install g++), then {advice}"
    return Finding("compiled core", "note", f"{cpu_core.absence()} Plain torch answers", advice)


def _triton() -> Finding:
    found = _version("triton")
    if found is None:
        state: State = "bad" if torch.cuda.is_available() else "good"
        advice = "pip install triton (Linux)" if state == "bad" else ""
        return Finding("triton", state, "not installed; only GPUs need it", advice)
    if torch.cuda.is_available() and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        advice = "install a C compiler (Debian: apt-get install gcc)"
        return Finding("triton", "bad", f"{found}, but no C compiler for its launchers", advice)
    if os.environ.get("TRITON_INTERPRET") == "1" and torch.cuda.is_available():
        return Finding("triton", "note", f"{found}, interpreted", "unset TRITON_INTERPRET")
    return Finding("triton", "good", found)


def _package(name: str, extra: str, use: str) -> Finding:
    found = _version(name)
    if found is None:
        return Finding(name, "note", f"not installed; {use}", f"pip install 'quantpage[{extra}]'")
    return _judged(name, found, _wanted(name))


def _vllm() -> Finding:
    found = _version("vllm")
    if found is None:
        return Finding("vllm", "good", "not installed; only serving through vLLM needs it")
    plugins = entry_points(group="vllm.general_plugins")
    ours = [each.name for each in plugins if each.value.startswith("quantpage")]
    if not ours:
        return Finding("vllm", "good", f"{found}; this QuantPage brings no plugin for it")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and not set(ours) & {each.strip() for each in allowed.split(",")}:
        advice = f"add {ours[0]} to VLLM_PLUGINS, or unset it"
        return Finding("vllm", "bad", f"{found}; VLLM_PLUGINS leaves the plugin out", advice)
    return _judged("vllm", found, _wanted("vllm"), f", plugin {', '.join(ours)}")


def _memory() -> Finding:
    free = available_bytes()
    if free is None:
        return Finding("memory", "good", "unknown on this system")
    text = f"{free / 2**30:.1f} GiB available"
    if free < SMALL_MEMORY:
        return Finding("memory", "note", text, "small models only; close other programs")
    return Finding("memory", "good", text)


def _self_test(kind: str) -> Iterator[Finding]:
    """A finding an implementation: the worst of what it was tried on."""
    by_name: dict[str, list[Tried]] = defaultdict(list)
    for each in self_test(device_info(kind)):
        by_name[each.implementation].append(each)
    for name, tried in by_name.items():
        wrong = [each for each in tried if not each.right]
        about = f"self-test, {kind}: {name}"
        if not wrong:
            worst = max(each.error for each in tried)
            found = f"{len(tried)} cases agree with float64 (largest error {worst:.0e})"
            yield Finding(about, "good", found)
            continue
        first = wrong[0]
        what = first.said or f"error {first.error:.1e}, allowed {first.allowed:.0e}"
        yield Finding(
            about,
            "bad",
            f"{len(wrong)} of {len(tried)} cases are wrong: {first.op}, {first.format}: {what}",
            "install the package again; if it stays, report it with this page",
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _wanted(package: str) -> SpecifierSet:
    """The versions that quantpage's own metadata allows, in any of its extras."""
    try:
        stated = requires("quantpage") or []
    except PackageNotFoundError:
        return SpecifierSet()
    for each in map(Requirement, stated):
        if each.name == package:
            return each.specifier
    return SpecifierSet()


def _judged(name: str, found: str, wanted: SpecifierSet, more: str = "") -> Finding:
    """Whether a version is one of those that are tested."""
    if wanted.contains(found, prereleases=True):
        return Finding(name, "good", f"{found} (tested: {wanted}){more}" if str(wanted) else found)
    return Finding(
        name,
        "note",
        f"{found}, which is not tested (tested: {wanted}){more}",
        f"{os.path.basename(sys.executable)} -m pip install '{name}{wanted}'",
    )
