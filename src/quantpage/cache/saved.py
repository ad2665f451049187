"""Pages in a file: safetensors with a description that has to agree before a page is used.

    tensors      <layer>.key.codes, .key.scale, .key.zero, .value.*, .exact_key, .exact_value,
                 .key_map.scale, .key_map.mean, .key_map.feedback, .key_map.turn
    metadata     kind, version, layouts (JSON), counts (JSON), note (JSON), checksum over
                 everything else

A file that is truncated, altered, of another version or of other layouts raises CorruptCache and
gives nothing, and so does one whose checksum is right and whose description cannot be: nothing of
it is believed before it was compared (cache/tensor_file reads and writes the bytes).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantpage.cache.layout import CacheLayout
from quantpage.cache.tensor_file import (
    Damaged,
    Entry,
    open_whole,
    parsed,
    shown,
    whole_number,
    write_whole,
)
from quantpage.errors import CacheError, CorruptCache
from quantpage.formats import CODES, ExactPages, Granularity, KeyMap, KVFormat, QuantSpec

KIND = "quantpage pages"
VERSION = "2"
_METADATA = {"kind", "version", "layouts", "counts", "note", "checksum"}
_FLOATS = {
    str(each).removeprefix("torch."): each
    for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_NUMBER, _MAYBE_NUMBER = (int,), (int, type(None))
_LAYOUT = {
    "kv_heads": _NUMBER,
    "head_dim": _NUMBER,
    "value_head_dim": _MAYBE_NUMBER,
    "page_size": _NUMBER,
    "dtype": (str,),
    "format": (str,),
    "key": (dict,),
    "value": (dict,),
    "exact_pages": _MAYBE_NUMBER,
    "near": (dict, type(None)),
    "latent": (bool,),
}
_PAIR = {"format": (str,), "key": (dict,), "value": (dict,)}
_SPEC = {
    "code": (str,),
    "group": _MAYBE_NUMBER,
    "per_head": (bool,),
    "dynamic": (bool,),
    "zero_point": (bool,),
    "rotation": (str,),
    "scale_dtype": (str,),
}


@dataclass(frozen=True, slots=True)
class SavedPages:
    """What a file holds."""

    layouts: dict[int, CacheLayout]
    counts: dict[int, tuple[int, int]]
    """Pages and exact pages of every layer."""
    planes: dict[str, Tensor]
    """By the names in the module's table."""
    note: dict[str, Any]
    """What the writer wanted to remember: lengths, tokens, the model."""


def write_pages(path: Path | str, saved: SavedPages) -> None:
    """Write ``saved`` to ``path``, whole and on the disk, or not at all.

    Raises CacheError, with what was there before left as it is, where it cannot be written.
    """
    metadata = {
        "kind": KIND,
        "version": VERSION,
        "layouts": json.dumps({str(i): _written(x) for i, x in saved.layouts.items()}),
        "counts": json.dumps({str(i): list(x) for i, x in saved.counts.items()}),
        "note": json.dumps(saved.note),
    }
    try:
        write_whole(Path(path), saved.planes, metadata)
    except OSError as error:
        raise CacheError(f"{path}: expected a place to write to, got {error.strerror}") from error


def read_pages(path: Path | str, expected: Mapping[int, CacheLayout] | None = None) -> SavedPages:
    """Read a file of pages; CorruptCache unless it is whole and what was expected.

    expected: the layouts that the pages are for; None: any. Raises CacheError for a file that
    cannot be read, FileNotFoundError where there is none.
    """
    path = Path(path)
    try:
        with open_whole(path) as file:
            _check_kind(file.metadata)
            layouts = {
                index: _layout(f"layer {index}", record)
                for index, record in _by_layer(parsed(file.metadata["layouts"]))
            }
            counts = _counts(parsed(file.metadata["counts"]), layouts)
            note = parsed(file.metadata["note"])
            if expected is not None:
                check_layouts(layouts, expected)
            _check_planes(file.entries, layouts, counts)
            planes = file.read()
        _check_key_maps(planes, layouts)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"path: expected a file of saved pages, got {path}") from error
    except Damaged as error:
        raise CorruptCache(f"{path}: {error}") from error
    except OSError as error:
        raise CacheError(f"{path}: expected a file to read, got {error.strerror}") from error
    return SavedPages(layouts, counts, planes, note)


def _check_kind(metadata: Mapping[str, str]) -> None:
    kind, version = metadata.get("kind"), metadata.get("version")
    if kind != KIND:
        raise Damaged(f"expected a file of {KIND}, got kind {shown(kind)}")
    if version != VERSION:
        raise Damaged(f"expected version {VERSION}, got {shown(version)}")
    if set(metadata) != _METADATA:
        raise Damaged(f"expected metadata {sorted(_METADATA)}, got {shown(sorted(metadata))}")


def check_layouts(layouts: Mapping[int, CacheLayout], expected: Mapping[int, CacheLayout]) -> None:
    """Raise Damaged unless these are the layers and layouts that were expected."""
    if set(layouts) != set(expected):
        raise Damaged(f"expected layers {sorted(expected)}, got layers {sorted(layouts)}")
    for index, wanted in expected.items():
        mine, theirs = _layout_record(wanted), _layout_record(layouts[index])
        for name, value in mine.items():
            if theirs[name] != value:
                raise Damaged(f"layer {index}, {name}: expected {value}, got {theirs[name]}")


def _by_layer(given: Mapping[str, Any]) -> list[tuple[int, Any]]:
    for name in given:
        if not re.fullmatch("0|[1-9][0-9]{0,8}", name):
            raise Damaged(f"expected a layer's index, got {shown(name)}")
    return [(int(name), each) for name, each in given.items()]


def _counts(
    given: Mapping[str, Any], layouts: Mapping[int, CacheLayout]
) -> dict[int, tuple[int, int]]:
    found = {}
    for index, pair in _by_layer(given):
        if type(pair) is not list or len(pair) != 2 or not all(map(whole_number, pair)):
            raise Damaged(f"layer {index}: expected pages and exact pages, got {shown(pair)}")
        found[index] = (pair[0], pair[1])
    if set(found) != set(layouts):
        raise Damaged(f"expected pages of layers {sorted(layouts)}, got them of {sorted(found)}")
    return found


_GIVEN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that static scales may be given in."""


def _check_planes(
    entries: Mapping[str, Entry],
    layouts: Mapping[int, CacheLayout],
    counts: Mapping[int, tuple[int, int]],
) -> None:
    """Exactly the tensors that such pages have, before one of them is read."""
    wanted: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    for index, layout in layouts.items():
        planes = _planes_of(layout, *counts[index])
        if f"{index}.key_map.scale" in entries:
            maps = _key_map_shapes(layout)
            planes |= {name: each for name, each in maps.items() if f"{index}.{name}" in entries}
        wanted |= {f"{index}.{name}": each for name, each in planes.items()}
    if set(wanted) != set(entries):
        missing, extra = sorted(set(wanted) - set(entries)), sorted(set(entries) - set(wanted))
        raise Damaged(
            f"expected the tensors of its layouts, got {shown(missing)} missing and "
            f"{shown(extra)} besides them"
        )
    for name, (dtype, shape) in wanted.items():
        entry = entries[name]
        fits = entry.dtype in _GIVEN if dtype is None else entry.dtype == dtype
        if not fits or entry.shape != shape:
            raise Damaged(
                f"{name}: expected {dtype or 'floating numbers'} of shape {shape}, got "
                f"{entry.dtype} of shape {entry.shape}"
            )


def _planes_of(
    layout: CacheLayout, pages: int, exact_pages: int
) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Dtype and shape of what ``PagedKVCache.to_save`` gives of a layer, its key map left out.

    None: static scales, which are of whatever floating dtype they were given in.
    """
    found = _halves_of(layout, pages, "")
    near = layout.near
    if near is not None and near.format.quantized:
        found |= _halves_of(near, exact_pages, "exact_")
    elif near is not None:
        for half, width in (("key", layout.head_dim), ("value", layout.v_dim)):
            shape = (exact_pages, layout.kv_heads, layout.page_size, width)
            found[f"exact_{half}"] = (layout.dtype, shape)
    return found


def _halves_of(
    layout: CacheLayout, pages: int, prefix: str
) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    found: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
    form = layout.format
    for half, spec, width in (
        (f"{prefix}key", form.key, layout.head_dim),
        (f"{prefix}value", form.value, layout.v_dim),
    ):
        dtype = spec.code.storage or layout.dtype
        # torch does not index every 8-bit dtype, so those go as bytes.
        dtype = torch.uint8 if dtype == torch.float8_e4m3fn else dtype
        found[f"{half}.codes"] = (dtype, layout.codes_shape(spec, width, pages))
        if spec.quantized:
            shape: tuple[int, ...] = spec.granularity.scale_shape(layout.kv_heads, width)
            if spec.dynamic:
                shape = layout.scale_shape(spec, width, pages)
            for name in ("scale", "zero") if spec.zero_point else ("scale",):
                found[f"{half}.{name}"] = (spec.scale_dtype if spec.dynamic else None, shape)
    return found


def _key_map_shapes(layout: CacheLayout) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    heads, width = layout.kv_heads, layout.head_dim
    return {
        "key_map.scale": (torch.float32, (heads, width)),
        "key_map.mean": (torch.float32, (heads, width)),
        "key_map.feedback": (torch.float32, (heads, width, width)),
        "key_map.turn": (torch.float32, (heads, width, width)),
    }


def _check_key_maps(planes: Mapping[str, Tensor], layouts: Mapping[int, CacheLayout]) -> None:
    for index in layouts:
        scale = planes.get(f"{index}.key_map.scale")
        if scale is not None:
            try:
                others = ("mean", "feedback", "turn")
                KeyMap(scale, *(planes.get(f"{index}.key_map.{each}") for each in others))
            except ValueError as error:
                raise Damaged(f"layer {index}, key map, {error}") from error


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
        "near": None if form.near is None else _pair_record(form.near),
        "latent": layout.latent,
    }


def _written(layout: CacheLayout) -> dict[str, Any]:
    """Its record, as it was before there were latent rows where it has none."""
    record = _layout_record(layout)
    if not layout.latent:
        del record["latent"]
    return record


def _pair_record(form: KVFormat) -> dict[str, Any]:
    return {
        "format": form.name,
        "key": _spec_record(form.key),
        "value": _spec_record(form.value),
    }


def _layout(name: str, record: Any) -> CacheLayout:
    if type(record) is dict:
        # Files of before there were near pages of codes have none, and most have no latent rows.
        record = {"near": None, "latent": False, **record}
    _check_fields(name, record, _LAYOUT)
    kept = record["exact_pages"]
    if kept not in (None, ExactPages.kept_pages):
        raise Damaged(
            f"{name}, exact_pages: expected {ExactPages.kept_pages} or null, got {shown(kept)}"
        )
    key, value = (_spec(f"{name}, {half}", record[half]) for half in ("key", "value"))
    dtype = _float(f"{name}, dtype", record["dtype"])
    try:
        form = KVFormat(
            record["format"],
            key,
            value,
            None if kept is None else ExactPages(),
            near=_near(f"{name}, near", record["near"]),
        )
        return CacheLayout(
            kv_heads=record["kv_heads"],
            head_dim=record["head_dim"],
            format=form,
            page_size=record["page_size"],
            dtype=dtype,
            value_head_dim=record["value_head_dim"],
            latent=record["latent"],
        )
    except ValueError as error:
        raise Damaged(f"{name}, {error}") from error


def _near(name: str, record: Any) -> KVFormat | None:
    if record is None:
        return None
    _check_fields(name, record, _PAIR)
    key, value = (_spec(f"{name}, {half}", record[half]) for half in ("key", "value"))
    return KVFormat(record["format"], key, value)


def _check_fields(name: str, record: Any, wanted: Mapping[str, tuple[type, ...]]) -> None:
    """Those names, each with a value of a type given, numbers small enough for a shape."""
    if type(record) is not dict or set(record) != set(wanted):
        raise Damaged(f"{name}: expected {', '.join(wanted)}, got {shown(record)}")
    for field, types in wanted.items():
        value = record[field]
        if type(value) not in types or (type(value) is int and not whole_number(value)):
            named = " or ".join(each.__name__ for each in types)
            raise Damaged(f"{name}, {field}: expected {named}, got {shown(value)}")


def _float(name: str, value: str) -> torch.dtype:
    if value not in _FLOATS:
        raise Damaged(f"{name}: expected one of {list(_FLOATS)}, got {shown(value)}")
    return _FLOATS[value]


def _spec_record(spec: QuantSpec) -> dict[str, Any]:
    if CODES.get(spec.code.name) != spec.code:
        raise ValueError(
            f"format: expected codes of {list(CODES)}, as a file names them only; got {spec.code}"
        )
    return {
        "code": spec.code.name,
        "group": spec.granularity.group,
        "per_head": spec.granularity.per_head,
        "dynamic": spec.dynamic,
        "zero_point": spec.zero_point,
        "rotation": spec.rotation,
        "scale_dtype": _dtype_name(spec.scale_dtype),
    }


def _spec(name: str, record: Any) -> QuantSpec:
    _check_fields(name, record, _SPEC)
    if record["code"] not in CODES:
        raise Damaged(f"{name}: expected a code of {list(CODES)}, got {shown(record['code'])}")
    scale_dtype = _float(f"{name}, scale_dtype", record["scale_dtype"])
    try:
        return QuantSpec(
            CODES[record["code"]],
            Granularity(record["group"], record["per_head"]),
            dynamic=record["dynamic"],
            zero_point=record["zero_point"],
            rotation=record["rotation"],
            scale_dtype=scale_dtype,
        )
    except ValueError as error:
        raise Damaged(f"{name}, {error}") from error


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
