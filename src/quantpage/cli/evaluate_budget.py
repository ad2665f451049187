"""What `quantpage evaluate --budget` says: the best choice, and what it was chosen over."""

import csv
import io
import re
from typing import Any

from quantpage import console
from quantpage.evaluate.advise import Advice, Point
from quantpage.evaluate.run import EvaluateRequest, made_with


def parse_bits(text: str) -> float:
    """'5.0bits' -> 5.0; ValueError says what was expected."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:b|bits?)?\s*", text.lower())
    if match is None or not 0 < float(match[1]) <= 16:
        raise ValueError(f"budget: expected bits a number up to 16, such as 5.0bits, got {text!r}")
    return float(match[1])


def print_advice(advice: Advice) -> None:
    """The table, and the line to copy."""
    table = console.new_table("choice", "bits a\nnumber", "expected\nKL")
    for point in sorted((*advice.uniform, advice.chosen), key=lambda each: each.bits):
        name = f"advised within {advice.budget:g}" if point is advice.chosen else point.line
        table.add_row(name, f"{point.bits:.2f}", f"{point.loss:.1e}")
    console.OUT.print(table)
    console.print_line(
        f"bits: of all that a request of {advice.context:,} tokens holds, with scales, pages kept "
        "exact and the end of the last page. expected KL: the sum of what each layer's keys and "
        "values lose alone, nats a token."
    )
    # Never folded: it is there to be copied.
    console.OUT.print(f"\n--kv-format {advice.chosen.line}", soft_wrap=True)


def as_data(advice: Advice) -> dict[str, Any]:
    """For a program."""
    return {
        "budget": advice.budget,
        "context": advice.context,
        "chosen": _data(advice.chosen),
        "uniform": [_data(each) for each in advice.uniform],
        "curve": [_data(each) for each in advice.curve],
        "losses": [
            {"layer": e.layer, "half": e.half, "format": e.format, "exact": e.exact, "kl": loss}
            for e, loss in advice.losses.items()
        ],
    }


def to_csv(advice: Advice, request: EvaluateRequest, text: str, device: str) -> str:
    """One line a point: the choice, one format for all layers, and the curve."""
    out = io.StringIO()
    points = [("chosen", advice.chosen)]
    points += [("uniform", each) for each in advice.uniform]
    points += [("curve", each) for each in advice.curve]
    rows = [
        {
            "kind": kind,
            "bits": f"{point.bits:.4f}",
            "expected_kl": f"{point.loss:.6g}",
            "kv_format": point.line,
            "budget": f"{advice.budget:g}",
            "context": advice.context,
            "model": request.model.rstrip("/").rpartition("/")[2],
            "text": text,
            "windows": request.windows,
            "prompt": request.prompt,
            "scored": request.scored,
            "page_size": request.page_size,
            "calibration": request.calibration.rpartition("/")[2],
            "dtype": request.dtype,
            **made_with(device),
        }
        for kind, point in points
    ]
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _data(point: Point) -> dict[str, Any]:
    return {"kv_format": point.line, "bits": point.bits, "expected_kl": point.loss}
