"""The plain C interface of the compiled core: its records and numbers, the one list of them.

csrc/records.h is written from here (``scripts/interface.py``), Python packs from here by name, and
a library says what it was compiled with, so that one of another list is refused when it is loaded.
Every field is 64 bits wide: a record of Python's is its fields one after the other.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

ENUMS: dict[str, tuple[str, ...]] = {
    # How a number is stored.
    "Code": ("F32", "BF16", "F16", "INT8", "INT4", "FP8", "INT6", "INT3"),
    "MaskKind": ("CAUSAL", "FULL", "INTERVALS"),
    # Records of a program (quantpage_run), each after its kind and size.
    "Kind": ("PROJECT", "WRITE", "ATTEND", "FINISH", "NORM"),
}
"""Numbers by name, from 0."""


def number(name: str) -> int:
    """What the core calls ``name``."""
    return next(names.index(name) for names in ENUMS.values() if name in names)


@dataclass(frozen=True)
class Record:
    """A struct of the interface."""

    name: str
    about: str
    body: str
    """Fields as C declares them, a line a type, with comments."""
    shared: bool = False
    """Begins with a Layer and a Step, which are packed once for many calls."""

    @cached_property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """(name, type) in order, an array's elements apart; without layer and step if shared."""
        found = []
        for line in self.body.splitlines():
            declared = line.partition("//")[0].strip().removesuffix(";")
            if not declared:
                continue
            given = re.fullmatch(r"((?:const )?\w+ ?\**?)(?<=[ *])([\w, \[\]]+)", declared)
            assert given is not None, declared
            kind, names = given[1].strip(), given[2]
            for name in re.split(r", *", names.strip()):
                array = re.fullmatch(r"(\w+)\[(\d+)\]", name)
                if array is None:
                    found.append((name, kind))
                else:
                    found += [(f"{array[1]}{i}", kind) for i in range(int(array[2]))]
        return tuple(found)

    @cached_property
    def form(self) -> struct.Struct:
        """How the fields are packed."""
        letters = "".join(
            RECORDS[kind].form.format[1:] if kind in RECORDS else "d" if kind == "double" else "q"
            for _, kind in self.fields
        )
        return struct.Struct("=" + letters)

    @cached_property
    def pack(self) -> Callable[..., bytes]:
        """The record's bytes from its fields, each given by name; a tuple for a record in it.

        What is shared stands before them. Compiled once, as a call has ten microseconds.
        """
        names = ", ".join(name for name, _ in self.fields)
        values = ", ".join(f"*{name}" if kind in RECORDS else name for name, kind in self.fields)
        made: Callable[..., bytes] = eval(
            f"lambda *, {names}: pack({values})", {"pack": self.form.pack}
        )
        return made

    @property
    def size(self) -> int:
        """Bytes, with what is shared."""
        return self.form.size + (LAYER.form.size + STEP.form.size if self.shared else 0)


PAGES = Record(
    "Pages",
    "K pages or V pages of one layer. Strides are in bytes, of page, head and token.",
    """
  uint8_t* codes;
  int64_t page_stride, head_stride, row_stride;
  int64_t code;
  int64_t head_dim;
  // Null for numbers kept as they are.
  uint8_t* scale;
  int64_t scale_page, scale_head, scale_row;
  // Null for symmetric codes.
  uint8_t* zero;
  int64_t zero_page, zero_head, zero_row;
  // F32 or F16.
  int64_t scale_type;
  // Channels that share a scale are head_dim / groups.
  int64_t groups;
  int64_t dynamic;
  int64_t rotated;
""",
)
LAYER = Record(
    "Layer",
    "One layer's pages.",
    """
  Pages key, value;
  // Numbers kept as they are; codes null where the format keeps none.
  Pages exact_key, exact_value;
  // [kv_heads, head_dim] of the key map, before the rotation: k' = scale (k - mean), and queries
  // q' = q / scale. Null: none.
  const float* map_scale;
  const float* map_mean;
  // [kv_heads, head_dim, head_dim] for keys that are rounded in turn (formats/feedback): U below
  // the diagonal, d on it. Null: each channel by itself.
  const float* feedback;
  // [kv_heads, head_dim, head_dim]: what rows of scaled keys, and of scaled queries, are multiplied
  // with before the rotation. Null: nothing.
  const float* map_turn;
  const float* map_unturn;
""",
)
STEP = Record(
    "Step",
    "One step's requests, the same for every layer.",
    """
  const int32_t* page_table;
  int64_t table_stride;
  // Null for formats without exact pages.
  const int32_t* exact_table;
  int64_t exact_stride;
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int64_t* slots;
  const int64_t* exact_slots;
  const int64_t* positions;
  int64_t requests, page_size;
""",
)
ATTEND = Record(
    "Attend",
    "Attention to what the pages hold.",
    """
  const uint8_t* q;
  int64_t q_type, q_token, q_head;
  // [tokens, q_heads, value_dim] contiguous, and [tokens, q_heads] or null.
  uint8_t* out;
  int64_t out_type;
  float* lse;
  const float* sinks;
  // INTERVALS: row r = (head *) tokens + token sees keys [low[i], high[i]) for i in
  // starts[r] .. starts[r + 1]; sorted and disjoint.
  const int64_t* starts;
  const int32_t* low;
  const int32_t* high;
  int64_t per_head;
  int64_t tokens, q_heads, kv_heads;
  // Keys are values as well, and value pages hold the channels that follow in a key: queries have
  // those of both, outputs those of the key pages.
  int64_t latent;
  int64_t mask, window, sink_tokens;
  // Outputs in the model's basis where values are cached rotated.
  int64_t model_basis;
  int64_t threads, isa;
  double softmax_scale, softcap;
""",
    shared=True,
)
WRITE = Record(
    "Write",
    "Norm, rotate, quantize, scatter.",
    """
  // Inputs [tokens, heads, head_dim], channels contiguous; strides in elements of `type`.
  const uint8_t* q;
  const uint8_t* k;
  const uint8_t* v;
  int64_t type;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  // Null where nobody wants them.
  uint8_t* q_out;
  uint8_t* k_rows;
  uint8_t* v_rows;
  // Null: no rotation.
  const float* cos;
  const float* sin;
  int64_t half_rotary, interleaved;
  // Null: no norm.
  const float* q_norm;
  const float* k_norm;
  int64_t norm_after;
  int64_t tokens, q_heads, kv_heads;
  int64_t threads, isa;
  double eps;
""",
    shared=True,
)
GATHER = Record(
    "Gather",
    "One request's rows.",
    """
  Pages pages;
  const int32_t* page_table;
  uint8_t* out;
  int64_t out_type;
  int64_t context, kv_heads, page_size;
  int64_t threads, isa;
""",
)
WEIGHT = Record(
    "Weight",
    "Rows of one type, as nn.Linear holds them.",
    """
  const uint8_t* numbers;
  int64_t rows;
  // BF16, a row of INT8 each; null for the other types.
  const uint8_t* scale;
  // Of the activations' type; null: none.
  const uint8_t* bias;
""",
)
PROJECT = Record(
    "Project",
    "out[t] = W norm(x[t]) for up to three weights, their rows one after the other.",
    """
  // [tokens, width] of `type`; weights are of `code`.
  const uint8_t* x;
  int64_t type, code, tokens, width;
  // Of an RMS norm, in `type`; null: none.
  const uint8_t* norm;
  Weight weights[3];
  // [tokens, rows of all weights] of `type`.
  uint8_t* out;
  // Rotary embedding, half-split, of the first `rotated` heads: [tokens, head_dim] of `type`.
  // Null: none.
  const uint8_t* cos;
  const uint8_t* sin;
  int64_t head_dim, rotated;
  int64_t threads, isa;
  double eps;
""",
)
FINISH = Record(
    "Finish",
    "The second half of a block: y = residual + O a, out = y + D (silu(G n) * U n), n = norm(y).",
    """
  // [tokens, attended_width], [tokens, width] and [tokens, width] of `type`.
  const uint8_t* attended;
  const uint8_t* residual;
  uint8_t* out;
  int64_t type, code, tokens, attended_width, width;
  const uint8_t* norm;
  Weight output, gate, up, down;
  int64_t threads, isa;
  double eps;
""",
)
NORM = Record(
    "Norm",
    "An RMS norm alone, in place.",
    """
  // [tokens, width] of `type`, as the weight.
  uint8_t* x;
  int64_t type, tokens, width;
  const uint8_t* weight;
  int64_t isa;
  double eps;
""",
)
_ALL = (PAGES, LAYER, STEP, ATTEND, WRITE, GATHER, WEIGHT, PROJECT, FINISH, NORM)
RECORDS: dict[str, Record] = {each.name: each for each in _ALL}


def described() -> str:
    """Every record and number in order, a line each: what a library has to say of itself."""
    lines = [f"{name}: {', '.join(names)}" for name, names in ENUMS.items()]
    for each in RECORDS.values():
        fields = ", ".join(f"{name} {kind}" for name, kind in each.fields)
        lines.append(f"{each.name}: {each.size} bytes, {fields}")
    return "\n".join(lines)


def difference(found: str) -> str:
    """Where a library's description departs from ours, in words; empty where it does not."""
    ours, theirs = (
        dict(line.partition(": ")[::2] for line in text.splitlines())
        for text in (described(), found)
    )
    for name, fields in ours.items():
        wanted, got = fields.split(", "), theirs.get(name, "nothing of it").split(", ")
        for at, field in enumerate(wanted):
            if at >= len(got) or got[at] != field:
                other = got[at] if at < len(got) else "its end"
                return f"expected {field} as number {at} of {name}, got {other}"
        if len(got) > len(wanted):
            return f"expected the end of {name} after {wanted[-1]}, got {got[len(wanted)]}"
    return ""


def header() -> str:
    """csrc/records.h."""
    lines = [
        "// The plain C interface: records of 64-bit fields, which Python packs in one call.",
        "//",
        "// Written by scripts/interface.py from cpu_core/interface.py, the one list.",
        "#pragma once",
        "#include <cstdint>",
    ]
    for name, names in ENUMS.items():
        numbered = ", ".join(f"{each} = {at}" for at, each in enumerate(names))
        lines += ["", f"enum {name} : int64_t {{ {numbered} }};"]
    for each in RECORDS.values():
        lines += ["", f"// {each.about}", f"struct {each.name} {{"]
        lines += ["  Layer layer;", "  Step step;"] if each.shared else []
        lines += [each.body.strip("\n"), "};"]
        lines += [f'static_assert(sizeof({each.name}) == {each.size}, "64 bits a field");']
    lines += ["", "// What quantpage_interface() says, for Python to compare."]
    lines += ["static const char RECORDS[] ="]
    lines += [f'  "{line}\\n"' for line in described().splitlines()]
    return "\n".join(lines) + ";\n"
