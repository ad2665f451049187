"""FORMATS: every format by its name, the only place where a name is spelled.

To add a format, add a line here (docs/adding-a-format.md). The tests, the bench cases, the support
matrix and `quantpage explain` iterate over this table.

The recipes were chosen by measurement: mean KL divergence to the unquantized cache, SmolLM2-135M,
head_dim 64, 2,048 scored tokens of Austen, dense fake quantization (scripts/compare_recipes.py,
benchmarks/results/recipes-smollm2.csv; `quantpage evaluate` measures FORMATS through the cache):

    keys / values                  bits         KL      with exact pages
    int8, one scale                8.25         5.0e-4  -
    int8, rotated                  8.25         1.5e-4  1.8e-5   int8, int8_exact
    int8, rotated, zero point      8.5          1.2e-4  -        a fifth better, 3 % more bytes
    int8, rotated, groups of 32    8.5          1.2e-4  -
    int8 / int4, rotated, zero     8.25, 4.5    4.7e-3  3.8e-4   k8v4
    int4, rotated, zero point      4.5          -       4.6e-3   int4
    int4, rotated, groups of 32    4.5          -       5.6e-3
    int4, rotated                  4.25         -       7.0e-3
    int4, zero point               4.5          -       9.9e-3

Exact pages buy more than any finer scale: what is recent decides. ``int8`` does without them,
because it is the format for engines that own their pages. A query that saw the page before its
own exactly as well would bring int4 to 2.0e-3 and k8v4 to 2.0e-4.
"""

import re
from dataclasses import replace
from difflib import get_close_matches

from quantpage.errors import FormatError
from quantpage.formats.spec import CODES, ExactPages, Granularity, KVFormat, QuantSpec

_INT8 = QuantSpec(CODES["int8"], rotation="hadamard")
_FP8 = QuantSpec(CODES["fp8"])
_INT6 = QuantSpec(CODES["int6"], zero_point=True, rotation="hadamard")
_INT3 = QuantSpec(CODES["int3"], zero_point=True, rotation="hadamard")
_INT4 = QuantSpec(CODES["int4"], zero_point=True, rotation="hadamard")
_INT8_STATIC = QuantSpec(CODES["int8"], Granularity(group=1), dynamic=False)
_FP8_STATIC = QuantSpec(CODES["fp8"], dynamic=False)
_INT4_STATIC = QuantSpec(CODES["int4"], Granularity(group=1), dynamic=False, zero_point=True)
_NONE = QuantSpec(CODES["none"])


def _named(
    name: str, key: QuantSpec, value: QuantSpec, summary: str, exact: bool = False
) -> KVFormat:
    return KVFormat(name, key, value, ExactPages() if exact else None, summary)


FORMATS: dict[str, KVFormat] = {
    each.name: each
    for each in (
        _named("none", _NONE, _NONE, "the model's own dtype, unquantized"),
        _named("int8", _INT8, _INT8, "int8, rotated, one scale a token and kv_head"),
        _named("int8_exact", _INT8, _INT8, "int8 with exact pages", exact=True),
        _named("fp8", _FP8, _FP8, "float8 e4m3, one scale a token and kv_head"),
        _named("int6", _INT6, _INT6, "6 bits, rotated, zero point"),
        _named("int4", _INT4, _INT4, "4 bits, rotated, zero point, exact pages", exact=True),
        _named("k8v4", _INT8, _INT4, "int8 keys, 4-bit values, exact pages", exact=True),
        _named("int3", _INT3, _INT3, "3 bits, rotated, zero point, exact pages", exact=True),
        _named("int8_static", _INT8_STATIC, _INT8_STATIC, "int8, one given scale a channel"),
        _named("fp8_static", _FP8_STATIC, _FP8_STATIC, "float8 e4m3, one given scale a kv_head"),
        _named("int4_static", _INT4_STATIC, _INT4_STATIC, "4 bits, given scale, zero a channel"),
    )
}

ALIASES: dict[str, str] = {
    "auto": "none",
    "block_wise_fp8": "fp8",
    "fp8_per_token_head": "fp8",
    "int8_per_token_head": "int8",
    "int4_per_token_head": "int4",
    "cache_int8": "int8_static",
    "cache_fp8": "fp8_static",
    "fp8_e4m3": "fp8_static",
    "cache_int4_zp": "int4_static",
}
"""Names that other systems use -> ours."""


_PAIR = re.compile(r"k=([^,=]*),v=([^,=]*)|v=([^,=]*),k=([^,=]*)")


def find_format(name: str) -> KVFormat:
    """The format called ``name``, by our name or another system's.

    "k=int8,v=int4" joins the keys of one format with the values of another; pages are kept exact
    where one of the two keeps some. "int4_near8" keeps them in int8 instead of 16 bits, and so does
    any name of a format with exact pages. Raises FormatError that lists the names there are.
    """
    pair = _PAIR.fullmatch(name)
    if pair is not None:
        first, second, value, key = pair.groups()
        keys, values = (first, second) if first is not None else (key, value)
        return join(find_format(keys), find_format(values))
    found = FORMATS.get(ALIASES.get(name, name))
    if found is None and name.endswith(NEAR8):
        return near8(find_format(name.removesuffix(NEAR8)))
    if found is None:
        half = re.match(r"([kv])=(.*)", name)
        if half is not None:
            other = {"k": "v", "v": "k"}[half[1]]
            raise FormatError(
                f"kv_format: expected keys and values by name, such as "
                f"{half[1]}={half[2] or 'int8'},{other}=int8; got {name!r}"
            )
        names = ", ".join(FORMATS)
        near = get_close_matches(name.lower(), [*FORMATS, *ALIASES], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FormatError(f"kv_format: expected one of {names}; got {name!r}{hint}")
    return found


def join(keys: KVFormat, values: KVFormat) -> KVFormat:
    """The keys of one format and the values of another, under its own name where FORMATS has it.

    FormatError where one keeps its exact pages in int8 and the other in 16 bits.
    """
    kept = [each for each in (keys, values) if each.exact_pages is not None]
    if len({each.near is None for each in kept}) > 1:
        raise FormatError(
            f"kv_format: expected {NEAR8} of both or of none, as a page is near for both; got "
            f"k={keys.name},v={values.name}"
        )
    key, value = (each.name.removesuffix(NEAR8) for each in (keys, values))
    made = KVFormat(
        f"k={key},v={value}",
        keys.key,
        values.value,
        keys.exact_pages or values.exact_pages,
        f"keys as {key}, values as {value}",
    )
    same = (each for each in FORMATS.values() if each == replace(made, name=each.name))
    found = next(same, made)
    return near8(found) if kept and kept[0].near is not None else found


NEAR8 = "_near8"
"""What a name ends in where exact pages are kept in int8."""


def near8(base: KVFormat) -> KVFormat:
    """``base`` with its exact pages in int8, one scale a token and kv_head, in its own basis.

    FormatError for a format that keeps none.
    """
    if base.exact_pages is None:
        raise FormatError(
            f"kv_format: expected a format with exact pages before {NEAR8}, such as int4{NEAR8}; "
            f"{base.name} keeps none"
        )
    key, value = (QuantSpec(CODES["int8"], rotation=e.rotation) for e in (base.key, base.value))
    name = f"{base.name}{NEAR8}"
    if base.name.startswith("k="):
        halves = base.name.split(",")
        name = ",".join(
            f"{half}{NEAR8}" if find_format(half[2:]).exact_pages is not None else half
            for half in halves
        )
    near = KVFormat("int8", key, value)
    return replace(base, name=name, near=near, summary=f"{base.summary}; these in int8")
