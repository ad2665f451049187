"""What runs, and why the others refused: the source of `quantpage explain` and of the matrix in
docs/support.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quantpage.formats import FORMATS, KVFormat
from quantpage.hardware import DeviceInfo
from quantpage.ops import attend, gather, rope_write
from quantpage.ops.dispatch import Call, Implementation

OPS: dict[str, list[Implementation]] = {
    "rope_write": rope_write.CANDIDATES,
    "attend prefill": attend.CANDIDATES,
    "attend decode": attend.CANDIDATES,
    "gather": gather.CANDIDATES,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One op and format: who serves it, and what every other candidate said."""

    op: str
    format: str
    chosen: str | None
    """None: nobody can."""
    refusals: tuple[tuple[str, str], ...]
    """(implementation, a sentence), in order of preference; a name that several have is told
    apart."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A sentence, and everything that it was said of."""

    sentence: str
    cases: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...]
    """(implementations, ops, formats): each of the first refuses each of the second for each of
    the third."""


def example_call(device: DeviceInfo, kv_format: KVFormat, mask: str = "causal") -> Call:
    """An 8B Llama's heads, which is what the matrix is made for."""
    return Call(
        device=device,
        format=kv_format,
        dtype=torch.bfloat16,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        value_head_dim=128,
        page_size=64,
        mask=mask,
    )


def explain(call: Call) -> list[Choice]:
    """Every op for one call, as automatic dispatch decides it."""
    rows = []
    for op, candidates in OPS.items():
        asked = replace(call, phase="decode" if op.endswith("decode") else "prefill")
        said = [(each, each.refusals(asked)) for each in candidates]
        chosen = next((each.name for each, reasons in said if not reasons), None)
        refusals = tuple(
            (_label(each, candidates), reason) for each, reasons in said for reason in reasons
        )
        rows.append(Choice(op, call.format.name, chosen, refusals))
    return rows


def distinct_refusals(choices: Sequence[Choice]) -> list[Refusal]:
    """Every sentence once, in the order in which they were first said."""
    said: dict[str, dict[str, dict[str, list[str]]]] = {}
    for choice in choices:
        for who, sentence in choice.refusals:
            formats = said.setdefault(sentence, {}).setdefault(who, {}).setdefault(choice.op, [])
            if choice.format not in formats:
                formats.append(choice.format)
    found = []
    for sentence, by_who in said.items():
        # Ops with the same formats together, then implementations that said it of the same.
        cases: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for who, by_op in by_who.items():
            alike: dict[tuple[str, ...], list[str]] = {}
            for op, formats in by_op.items():
                alike.setdefault(tuple(formats), []).append(op)
            for formats_of, ops in alike.items():
                cases.setdefault((tuple(ops), formats_of), []).append(who)
        found.append(
            Refusal(
                sentence, tuple((tuple(who), ops, names) for (ops, names), who in cases.items())
            )
        )
    return found


def candidates_of(call: Call, op: str) -> list[tuple[str, list[str]]]:
    """(implementation, its sentences) of one op in order of preference; no sentence: it can.

    op: of OPS, or its last word ('prefill').
    """
    names = {key.split()[-1]: key for key in OPS} | {key: key for key in OPS}
    if op not in names:
        short = ", ".join(key.split()[-1] for key in OPS)
        raise ValueError(f"op: expected one of {short}; got {op!r}")
    candidates = OPS[names[op]]
    asked = replace(call, phase="decode" if op.endswith("decode") else "prefill")
    return [(_label(each, candidates), each.refusals(asked)) for each in candidates]


def _label(found: Implementation, candidates: list[Implementation]) -> str:
    """Its name; where others have the same, also what its module is about."""
    if sum(each.name == found.name for each in candidates) == 1:
        return found.name
    *_, room, module = found.target.partition(":")[0].split(".")
    about = module.removeprefix(f"{found.name}_")
    # decode/gluon.py is about decode: a module that has the implementation's name says no more.
    return f"{found.name} ({room if about == found.name else about})"


DEVICES: dict[str, DeviceInfo] = {
    "Hopper": DeviceInfo("cuda", "an NVIDIA Hopper GPU", (9, 0), 132),
    "Ampere": DeviceInfo("cuda", "an NVIDIA Ampere GPU", (8, 0), 108),
    "CPU": DeviceInfo("cpu", "a CPU", None, 2),
}
"""What the support matrix is made for; facts of devices, so that any machine can print it."""

_COLUMNS = (
    ("rope_write", "rope_write", "causal"),
    ("prefill", "attend prefill", "causal"),
    ("decode", "attend decode", "causal"),
    ("flash_mask prefill", "attend prefill", "interval"),
    ("flash_mask decode", "attend decode", "interval"),
)


def support_matrix() -> str:
    """Markdown: a row a format and device, a column an op; cells name what runs."""
    heads = [label for label, _, _ in _COLUMNS]
    lines = ["| format | device | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for name, kv_format in FORMATS.items():
        for label, device in DEVICES.items():
            cells = []
            for _, op, mask in _COLUMNS:
                rows = explain(example_call(device, kv_format, mask))
                cells.append(next(row.chosen for row in rows if row.op == op) or "-")
            lines.append(f"| `{name}` | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
