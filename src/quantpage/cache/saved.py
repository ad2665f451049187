"""Pages in a file: safetensors with a description that has to agree before a page is used.

    tensors      <layer>.key.codes, .key.scale, .key.zero, .value.*, .exact_key, .exact_value,
                 .key_map.scale, .key_map.mean, .key_map.feedback
    metadata     kind, version, layouts (JSON), note (JSON), checksum over everything else

A file that is truncated, altered, of another version or of other layouts raises CorruptCache and
gives nothing. Writing goes to a file beside it that is renamed when it is whole, so that a
reader never sees half a file, and a crash leaves the old one.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantpage.cache.layout import CacheLayout
from quantpage.errors import CorruptCache
from quantpage.formats import CODES, ExactPages, Granularity, KVFormat, QuantSpec

KIND = "quantpage pages"
VERSION = "1"


@dataclass(frozen=True, slots=True)
class SavedPages:
    """What a file holds."""

    layouts: dict[int, CacheLayout]
    planes: dict[str, Tensor]
    """By the names in the module's table."""
    note: dict[str, Any]
    """What the writer wanted to remember: lengths, tokens, the model."""


def write_pages(path: Path | str, saved: SavedPages) -> None:
    """Write ``saved`` to ``path``, whole or not at all."""
    path = Path(path)
    planes = {name: plane.detach().cpu().contiguous() for name, plane in saved.planes.items()}
    metadata = {
        "kind": KIND,
        "version": VERSION,
        "layouts": json.dumps({str(i): _layout_record(x) for i, x in saved.layouts.items()}),
        "note": json.dumps(saved.note),
    }
    metadata["checksum"] = checksum(metadata, planes)
    write_whole(path, planes, metadata)


def write_whole(path: Path, planes: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(planes, name, metadata)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def read_pages(path: Path | str, expected: Mapping[int, CacheLayout] | None = None) -> SavedPages:
    """Read a file of pages; CorruptCache unless it is whole and what was expected.

    expected: the layouts that the pages are for; None: any.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a file of saved pages, got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            _check_kind(path, metadata)
            planes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptCache(f"{path}: expected a whole safetensors file, got {error}") from error
    said = metadata.pop("checksum", "none")
    found = checksum(metadata, planes)
    if said != found:
        raise CorruptCache(f"{path}: expected checksum {said}, got {found}: it was altered")
    layouts = {int(i): _layout(x) for i, x in json.loads(metadata["layouts"]).items()}
    if expected is not None:
        _check_layouts(path, layouts, expected)
    return SavedPages(layouts, planes, json.loads(metadata["note"]))


def _check_kind(path: Path, metadata: Mapping[str, str]) -> None:
    kind, version = metadata.get("kind"), metadata.get("version")
    if kind != KIND:
        raise CorruptCache(f"{path}: expected a file of {KIND}, got kind {kind!r}")
    if version != VERSION:
        raise CorruptCache(f"{path}: expected version {VERSION}, got {version!r}")


def _check_layouts(
    path: Path, layouts: Mapping[int, CacheLayout], expected: Mapping[int, CacheLayout]
) -> None:
    if set(layouts) != set(expected):
        raise CorruptCache(
            f"{path}: expected layers {sorted(expected)}, got layers {sorted(layouts)}"
        )
    for index, wanted in expected.items():
        mine, theirs = _layout_record(wanted), _layout_record(layouts[index])
        for name, value in mine.items():
            if theirs[name] != value:
                raise CorruptCache(
                    f"{path}, layer {index}, {name}: expected {value}, got {theirs[name]}"
                )


def checksum(metadata: Mapping[str, str], planes: Mapping[str, Tensor]) -> str:
    """Of everything else in a file."""
    made = blake2b(digest_size=16)
    for name in sorted(metadata):
        made.update(f"{name}={metadata[name]}\n".encode())
    for name in sorted(planes):
        plane = planes[name]
        made.update(f"{name} {plane.dtype} {tuple(plane.shape)}\n".encode())
        made.update(plane.contiguous().view(torch.uint8).numpy().data)
    return made.hexdigest()


def _layout_record(layout: CacheLayout) -> dict[str, Any]:
    form = layout.format
    return {
        "kv_heads": layout.kv_heads,
        "head_dim": layout.head_dim,
        "value_head_dim": layout.v_dim,
        "page_size": layout.page_size,
        "dtype": _dtype_name(layout.dtype),
        "format": form.name,
        "key": _spec_record(form.key),
        "value": _spec_record(form.value),
        "exact_pages": None if form.exact_pages is None else form.exact_pages.kept_pages,
    }


def _layout(record: Mapping[str, Any]) -> CacheLayout:
    kept = record["exact_pages"]
    return CacheLayout(
        kv_heads=record["kv_heads"],
        head_dim=record["head_dim"],
        format=KVFormat(
            record["format"],
            _spec(record["key"]),
            _spec(record["value"]),
            None if kept is None else ExactPages(kept),
        ),
        page_size=record["page_size"],
        dtype=getattr(torch, record["dtype"]),
        value_head_dim=record["value_head_dim"],
    )


def _spec_record(spec: QuantSpec) -> dict[str, Any]:
    return {
        "code": spec.code.name,
        "group": spec.granularity.group,
        "per_head": spec.granularity.per_head,
        "dynamic": spec.dynamic,
        "zero_point": spec.zero_point,
        "rotation": spec.rotation,
        "scale_dtype": _dtype_name(spec.scale_dtype),
    }


def _spec(record: Mapping[str, Any]) -> QuantSpec:
    return QuantSpec(
        CODES[record["code"]],
        Granularity(record["group"], record["per_head"]),
        dynamic=record["dynamic"],
        zero_point=record["zero_point"],
        rotation=record["rotation"],
        scale_dtype=getattr(torch, record["scale_dtype"]),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
