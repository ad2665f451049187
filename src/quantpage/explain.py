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
    """(implementation, its sentences)."""


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
        said = [(each.name, " ".join(each.refusals(asked))) for each in candidates]
        chosen = next((name for name, reason in said if not reason), None)
        refusals = tuple((name, reason) for name, reason in said if reason)
        rows.append(Choice(op, call.format.name, chosen, refusals))
    return rows


def support_matrix(devices: dict[str, DeviceInfo]) -> str:
    """Markdown: a row a format, a column a device, op and mask; cells name implementations."""
    columns = [
        (label, device, op, mask)
        for label, device in devices.items()
        for op, mask in (
            ("rope_write", "causal"),
            ("attend prefill", "causal"),
            ("attend decode", "causal"),
            ("attend prefill", "interval"),
        )
    ]
    heads = [
        f"{label}: {op}" + ("" if mask == "causal" else " (flash_mask)")
        for label, _, op, mask in columns
    ]
    lines = ["| format | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, kv_format in FORMATS.items():
        cells = []
        for _, device, op, mask in columns:
            rows = explain(example_call(device, kv_format, mask))
            chosen = next(row.chosen for row in rows if row.op == op)
            cells.append(chosen or "-")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)
