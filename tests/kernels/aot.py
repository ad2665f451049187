"""Ahead-of-time compilation without a GPU, and what the machine code says."""

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")

SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes that one program may have, by compute capability (CUDA C++ programming guide)."""


@dataclass
class Resources:
    """What one compiled kernel takes."""

    registers: int
    stack: int
    local: int
    shared: int
    counts: collections.Counter = field(repr=False)
    loop: list[str] = field(repr=False)
    """Instructions of the hottest loop (the longest one that holds a matrix product)."""
    inner: list[str] = field(repr=False)
    """The same of loops that hold no other with products."""

    def find(self, pattern: str) -> int:
        return sum(n for name, n in self.counts.items() if re.match(pattern, name))

    def in_loop(self, pattern: str = ".") -> int:
        return sum(1 for name in self.loop if re.match(pattern, name))


def compile_kernel(kernel, arguments: dict, capability: int, **options):
    """arguments: a type ("*fp16", "i32", "fp32", "tensordesc<..>") for run-time ones, a NamedTuple
    of types for a record, anything else is constexpr.

    Types that end in ':16' are multiples of 16.
    """
    signature, constants, aligned = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        given = arguments[name]
        if isinstance(given, tuple) and isinstance(given[0], str):
            signature[name] = type(given)(*(each.removesuffix(":16") for each in given))
            for inner, each in enumerate(given):
                if each.endswith(":16") or each.startswith("*"):
                    aligned[(at, inner)] = [["tt.divisibility", 16]]
        elif isinstance(given, str) and re.match(r"\*|i32|i64|fp32|tensordesc", given):
            signature[name] = given.removesuffix(":16")
            if given.endswith(":16") or given.startswith("*"):
                aligned[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(at,)] = given
    source_of = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_of(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?SHARED:(\d+).*?LOCAL:(\d+)", usage)
    assert found is not None, usage
    names = [m.group(1) for m in map(_INSTRUCTION.match, sass.splitlines()) if m]
    return Resources(
        int(found.group(1)), int(found.group(2)), int(found.group(4)), compiled.metadata.shared,
        collections.Counter(names), *_loops(sass),
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [os.path.join(_TOOLS, tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def _loops(sass: str) -> tuple[list[str], list[str]]:
    """The shortest backward branch's body among those with the most matrix products, and the same
    among those that hold no other with products.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label.group(1)] = len(lines)
            continue
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        lines.append(found.group(1))
        target = re.search(r"BRA.*?\(?(\.L_x_\d+)", line)
        if target and target.group(1) in labels:
            loops.append((labels[target.group(1)], len(lines)))

    def products(loop: tuple[int, int]) -> int:
        wanted = ("HMMA", "HGMMA", "UTCHMMA")
        return sum(1 for name in lines[slice(*loop)] if name.startswith(wanted))

    def best(loops: list[tuple[int, int]]) -> list[str]:
        rank = max(loops, key=lambda one: (products(one), one[0] - one[1]), default=(0, 0))
        return lines[slice(*rank)]

    busy = [loop for loop in loops if products(loop)]
    # Not what begins inside another loop and ends behind it: turns of a wait stand at the end.
    inner = [one for one in busy if not any(o[1] < one[1] and one[0] < o[1] for o in busy)]
    return best(busy), best(inner)
