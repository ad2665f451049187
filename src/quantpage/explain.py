"""What runs, and why the others refused: the source of `quantpage explain` and of the README's
support matrix.
"""

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
    """(implementation, its sentences); a name that several have is told apart."""


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
        said = [(each, " ".join(each.refusals(asked))) for each in candidates]
        chosen = next((each.name for each, reason in said if not reason), None)
        refusals = tuple((_label(each, candidates), reason) for each, reason in said if reason)
        rows.append(Choice(op, call.format.name, chosen, refusals))
    return rows


def _label(found: Implementation, candidates: list[Implementation]) -> str:
    """Its name; where others have the same, also what its module is about."""
    if sum(each.name == found.name for each in candidates) == 1:
        return found.name
    module = found.target.partition(":")[0].rpartition(".")[2].removeprefix(f"{found.name}_")
    return f"{found.name} ({module})"


DEVICES: dict[str, DeviceInfo] = {
    "Hopper": DeviceInfo("cuda", "an NVIDIA Hopper GPU", (9, 0), 132, 50 << 20),
    "Ampere": DeviceInfo("cuda", "an NVIDIA Ampere GPU", (8, 0), 108, 40 << 20),
    "CPU": DeviceInfo("cpu", "a CPU", None, 2, 0),
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
