"""Inline PTX in Triton's interpreter: what tensor cores and lanes of a warp do, in numpy.

For ``inline_asm_elementwise`` of eight channels a thread on tensors [rows, 32], as
triton_products lays them out: lane 4 g + t has channels 8 t .. 8 t + 7 of row g.
"""

import ctypes
import re

import numpy as np

Registers = dict[str, np.ndarray]
SHARED = bytearray()
"""Memory of the program that runs: one array, by whatever name."""


def run(text: str, operands: list[np.ndarray], outputs: int, total: int) -> list[np.ndarray]:
    """Operands [rows, 32] of 32 or 16 bits -> as many outputs, of ``total`` registers."""
    warps = operands[0].shape[0] // 8
    registers: Registers = {}
    count = total
    for operand in operands:
        words = np.ascontiguousarray(operand.reshape(warps, 32, 8)).view(np.uint32)
        for i in range(words.shape[-1]):
            registers[f"${count}"] = words[..., i].copy()
            count += 1
    for i in range(total):
        registers[f"${i}"] = np.zeros((warps, 32), np.uint32)
    for line in re.findall(r"[^;\s][^;]*(?=;)", text.strip()[1:-1]):
        if not line.startswith(".reg"):
            _step(line.strip(), registers)
    each = total // outputs
    found = []
    for first in range(0, total, each):
        words = np.stack([registers[f"${first + i}"] for i in range(each)], -1)
        kind = np.float32 if each == 8 else np.float16
        found.append(words.view(kind).reshape(-1, 32))
    return found


def copy(text: str, sources: list[np.ndarray]) -> None:
    """Asynchronous copies of sixteen bytes a thread from ``sources``, which are addresses."""
    SHARED[:] = bytes(int(re.findall(r"\.shared .*\[(\d+)\]", text)[0]))
    source, most = -1, 0
    for line in text.split("\n"):
        found = [int(x) for x in re.findall(r"(?<=\+)\d+", line)]
        if "add.s64" in line:
            source += 1
        elif "setp" in line:
            most = int(line.split()[-1].rstrip(";"))
        elif "cp.async.cg" in line:
            for first in range(0, min(most, 16 * len(sources[source])), 16):
                to, at = found[0] + first, int(sources[source][first // 16]) + found[1] + first
                SHARED[to : to + 16] = ctypes.string_at(at, 16)


def _float(word: np.ndarray) -> np.ndarray:
    return word.astype(np.uint32).view(np.float32).astype(np.float64)


def _bits(number: np.ndarray) -> np.ndarray:
    return np.asarray(number, np.float32).view(np.uint32)


def _step(line: str, registers: Registers) -> None:
    name, rest = line.split(None, 1)
    parts = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
    if name.startswith("mma.sync"):
        into, *given = ([each.strip() for each in p[1:-1].split(",")] for p in parts)
        kind = "tf32" if ".m16n8k8." in name else re.findall(r"\.(f16|bf16)\.", name)[0]
        results = _multiply(kind, *([registers[r] for r in one] for one in given))
        registers |= dict(zip(into, results, strict=True))
        return

    if name == "ld.shared.v4.b32":
        names, (at, offset) = (re.findall(r"[$\w]+", each) for each in parts)
        words = np.frombuffer(bytes(SHARED), np.uint32)
        first = (registers[at] + int(offset)) // 4
        registers |= {to: words[first + i] for i, to in enumerate(names)}
        return

    def value(text: str) -> np.ndarray:
        if text == "%laneid":
            return np.broadcast_to(np.arange(32, dtype=np.uint32), registers["$0"].shape)
        if text in registers:
            return registers[text]
        if text.isidentifier():
            # Where shared memory begins.
            text = "0"
        shape = registers["$0"].shape
        if text.startswith(("0x", "0f")):
            return np.full(shape, int(text[2:], 16), np.uint32)
        number = float(text) if "." in text else None
        return np.full(shape, text, np.int64).astype(np.uint32) if number is None else np.full(
            shape, _bits(np.float32(number)), np.uint32)  # fmt: skip

    if name == "mov.b32" and parts[0].startswith("{"):
        low, high = (each.strip() for each in parts[0][1:-1].split(","))
        word = registers[parts[1]]
        registers |= {low: word & 0xFFFF, high: word >> 16}
        return
    if name in ("cvt.rn.f16x2.f32", "cvt.f32.f16"):
        registers[parts[0]] = _converted(name, [registers[p] for p in parts[1:]])
        return

    to, given = parts[0], [value(p) for p in parts[1:]]
    operation, bits = name.split(".")[0], name.endswith((".b32", ".s32", ".u32"))
    numbers = given if bits else [_float(each) for each in given]
    with np.errstate(all="ignore"):
        if operation == "mov":
            registers[to] = given[0]
        elif operation == "setp":
            registers[to] = given[0] == given[1]
        elif operation == "selp":
            registers[to] = np.where(registers[parts[3]], given[0], given[1])
        elif bits:
            registers[to] = {
                "and": np.bitwise_and, "xor": np.bitwise_xor, "mad": lambda a, b, c: a * b + c,
            }[operation](*given)  # fmt: skip
        else:
            done = {
                "fma": lambda a, b, c: a * b + c, "add": np.add, "sub": np.subtract,
                "neg": np.negative, "min": np.fmin,
            }[operation](*numbers)  # fmt: skip
            if ".sat" in name:
                done = np.nan_to_num(np.clip(done, 0.0, 1.0), nan=0.0)
            registers[to] = _bits(done)


def _converted(name: str, given: list[np.ndarray]) -> np.ndarray:
    if name == "cvt.f32.f16":
        return _bits(given[0].astype(np.uint16).view(np.float16).astype(np.float32))
    with np.errstate(all="ignore"):
        high, low = (_float(each).astype(np.float16).view(np.uint16) for each in given)
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def _multiply(
    kind: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]
) -> list[np.ndarray]:
    """mma.sync of 16 x 8 results, the PTX manual's layouts."""
    warps = a[0].shape[0]
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    inner = 8 if kind == "tf32" else 16
    left, right = np.zeros((warps, 16, inner)), np.zeros((warps, inner, 8))
    sums = np.zeros((warps, 16, 8))
    for i, word in enumerate(a):
        row, column = g + 8 * (i % 2), (4 if kind == "tf32" else 8) * (i // 2)
        if kind == "tf32":
            left[:, row, column + t] = _float(word & 0xFFFFE000)
        else:
            for d, half in enumerate(_halves(kind, word)):
                left[:, row, column + 2 * t + d] = half
    for i, word in enumerate(b):
        if kind == "tf32":
            right[:, t + 4 * i, g] = _float(word & 0xFFFFE000)
        else:
            for d, half in enumerate(_halves(kind, word)):
                right[:, 8 * i + 2 * t + d, g] = half
    for i, word in enumerate(c):
        sums[:, g + 8 * (i // 2), 2 * t + i % 2] = _float(word)
    with np.errstate(all="ignore"):
        sums = sums + left @ right
    return [_bits(sums[:, g + 8 * (i // 2), 2 * t + i % 2]) for i in range(4)]


def _halves(kind: str, word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = word & 0xFFFF, word >> 16
    if kind == "bf16":
        return _float(low << 16), _float(high << 16)
    return tuple(each.astype(np.uint16).view(np.float16).astype(np.float64) for each in (low, high))
