"""The form of a report's data: what is written, and what `quantpage compare` accepts."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantpage.errors import CorruptReport

KIND = "quantpage report"
VERSION = 1
"""Raised where a field changes its meaning or goes; new ones may come without."""

_NUMBER = (int, float)
_ROW = {
    "format": str,
    "kl_mean": _NUMBER,
    "kl_p99": _NUMBER,
    "kl_max": _NUMBER,
    "top1": _NUMBER,
    "top1_error": _NUMBER,
    "overlap": _NUMBER,
    "perplexity": _NUMBER,
    "tokens": int,
}
_OURS = {"bits": _NUMBER, "bytes_per_token": _NUMBER, "sixteen_bit_tokens": str}
FIELDS: dict[str, Any] = {
    "kind": str,
    "version": int,
    "made": dict.fromkeys(
        (
            "model_digest", "text", "text_digest", "dtype", "device", "quantpage", "torch",
            "transformers", "calibration", "command", "date",
        ),
        str,
    ),
    "model": {
        "name": str, "type": str, "layers": int, "q_heads": int, "kv_heads": int, "head_dim": int
    },
    "fidelity": {"rows": [_ROW | _OURS], "yardstick": (_ROW, None)},
    "position": {"edges": [int], "kl": {"*": [_NUMBER]}},
    "answers": {
        "steps": int, "count": int, "prompt": int, "kl": {"*": [_NUMBER]}, "until": {"*": [int]}
    },
    "needle": {
        "cells": [{"length": int, "depth": _NUMBER}],
        "found": {"*": [{"right": bool, "probability": _NUMBER}]},
    },
    "heads": {
        "tokens": int,
        "errors": {"*": {"keys": {"*": [_NUMBER]}, "values": {"*": [_NUMBER]}}},
        "pictures": {
            "tokens": int,
            "channels": int,
            "heads": [
                {
                    "layer": int, "head": int, "outliers": [[_NUMBER]], "map_in_use": bool,
                    "largest": [_NUMBER], "data": str,
                }
            ],
        },
    },
    "advice": {
        "context": int,
        "curve": [{"line": str, "bits": _NUMBER, "loss": _NUMBER}],
        "uniform": [{"line": str, "bits": _NUMBER, "loss": _NUMBER}],
        "why": str,
    },
    "speed": {
        "rows": [{"format": str, "context": int, "microseconds": _NUMBER, "bytes": int}],
        "why": str,
    },
    "memory": {
        "contexts": [int],
        "unquantized": [int],
        "free": (int, None),
        "rows": [{"format": str, "bytes_per_token": int, "request_bytes": [int]}],
    },
    "served": {
        "choices": [{"format": str, "op": str, "chosen": (str, None)}],
        "refused": [{"sentence": str}],
    },
    "verdict": {
        "take": str, "headline": str, "reasons": [str], "levels": {"*": str}, "flag": str
    },
}  # fmt: skip
"""Names and types; a list has one kind of element, "*" stands for any name, a pair for either."""


def check(data: Any, where: str = "report") -> None:
    """CorruptReport that names the first field that is missing or of another type."""
    if not isinstance(data, Mapping) or data.get("kind") != KIND:
        raise CorruptReport(f"{where}: expected the data of `quantpage report`, got something else")
    if data.get("version") != VERSION:
        raise CorruptReport(f"{where}: expected version {VERSION}, got {data.get('version')!r}")
    _check(data, FIELDS, where)


def load(path: Path) -> dict[str, Any]:
    """A report's data; CorruptReport unless it is one, FileNotFoundError where no file is."""
    if not path.is_file():
        raise FileNotFoundError(
            f"report: expected the .json that `quantpage report` writes beside its page, got {path}"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptReport(f"{path}: expected JSON of `quantpage report`, got {error}") from error
    check(data, str(path))
    return data


def _check(value: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, tuple) and None in wanted:
        if value is not None:
            _check(value, wanted[0], where)
    elif isinstance(wanted, dict):
        if not isinstance(value, Mapping):
            raise CorruptReport(f"{where}: expected names and values, got {_short(value)}")
        for name, each in wanted.items():
            if name == "*":
                for key, one in value.items():
                    _check(one, each, f"{where}.{key}")
            elif name not in value:
                raise CorruptReport(f"{where}: expected {name!r}, found none")
            else:
                _check(value[name], each, f"{where}.{name}")
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            raise CorruptReport(f"{where}: expected a list, got {_short(value)}")
        for at, one in enumerate(value):
            _check(one, wanted[0], f"{where}[{at}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise CorruptReport(f"{where}: expected a finite number, got {value}")
    elif not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        kind = "a number" if wanted is _NUMBER else f"a {wanted.__name__}"
        raise CorruptReport(f"{where}: expected {kind}, got {_short(value)}")


def _short(value: Any) -> str:
    return repr(value)[:40]
