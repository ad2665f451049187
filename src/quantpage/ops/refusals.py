"""Why an implementation cannot serve a call: every condition and its sentence, once.

A sentence says what is needed and what came: "needs a head_dim up to 256, got 320." Conditions are
joined with ``refuse`` to what a candidate asks; the lists of this package's own stand at the end.
Imports no triton, as dispatch asks on any machine.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec

import torch

from quantpage.cpu_core import absence
from quantpage.formats import QuantSpec
from quantpage.ops.dispatch import DECODE_TOKENS, Call

Condition = Callable[[Call], Iterator[str]]
"""The sentences of one condition; none where a call fulfils it."""
Refusals = Callable[[Call], list[str]]

HOPPER_WIDTHS = (128, 256)
"""head_dims of the Hopper decode kernel, the same for keys and values."""


def refuse(*conditions: Condition, first: tuple[Condition, ...] = ()) -> Refusals:
    """What a candidate says: the sentences of all ``conditions``, in their order.

    first: where one of these says something, nothing else is asked.
    """

    def refusals(call: Call) -> list[str]:
        for condition in first:
            said = list(condition(call))
            if said:
                return said
        return [said for condition in conditions for said in condition(call)]

    return refusals


# Where it runs.


def device(kind: str) -> Condition:
    """'cpu' or 'cuda'."""
    named = {"cpu": "a CPU", "cuda": "a CUDA device"}[kind]

    def condition(call: Call) -> Iterator[str]:
        if call.device.kind != kind:
            yield f"needs {named}, got {call.device.kind}."

    return condition


def capability(least: tuple[int, int], later: bool) -> Condition:
    """Of a CUDA device; later: also newer ones."""
    wanted = f"{_version(least)}{' or later' if later else ''}"

    def condition(call: Call) -> Iterator[str]:
        found = call.device.capability
        if found is not None and (found < least or (found != least and not later)):
            yield f"needs compute capability {wanted}, got {_version(found)}."

    return condition


def triton(call: Call) -> Iterator[str]:
    """The package."""
    if not installed("triton"):
        yield "needs Triton, which is not installed."


def gluon(call: Call) -> Iterator[str]:
    """Triton's lower level."""
    if installed("triton") and not installed("triton.experimental.gluon"):
        yield "needs Triton 3.6 or later, which brings Gluon."


@lru_cache
def installed(package: str) -> bool:
    """Whether a package is there: looked for once, as that reads folders, and layers ask."""
    return find_spec(package) is not None


def core(call: Call) -> Iterator[str]:
    """The compiled core."""
    missing = absence()
    if missing:
        yield missing


# What is asked.


def phase(wanted: str) -> Condition:
    """'prefill' or 'decode'."""
    most = {"decode": "at most", "prefill": "more than"}[wanted]

    def condition(call: Call) -> Iterator[str]:
        if call.phase != wanted:
            yield (
                f"needs the {wanted} phase ({most} {DECODE_TOKENS} new tokens a request), "
                f"got {call.phase}."
            )

    return condition


def masks(*kinds: str) -> Condition:
    """Kinds of mask that are served."""
    article = "an" if kinds[0] == "interval" else "a"

    def condition(call: Call) -> Iterator[str]:
        if call.mask not in kinds:
            yield f"needs {article} {_either(kinds)} mask, got {call.mask}."

    return condition


def queries(*dtypes: torch.dtype) -> Condition:
    """Dtypes of queries, which keys and values share."""
    wanted = _either(tuple(map(_short, dtypes)))

    def condition(call: Call) -> Iterator[str]:
        if call.dtype not in dtypes:
            yield f"needs queries in {wanted}, got {_short(call.dtype)}."

    return condition


def whole_blocks_in_turn(call: Call) -> Iterator[str]:
    """Of writing: keys that are rounded in turn by one range a row, in whole blocks of channels."""
    if not call.in_turn:
        return
    if call.head_dim % 16:
        yield (
            "needs a head_dim that is a multiple of 16 for a key map with feedback, "
            f"got {call.head_dim}."
        )
    for name, spec, width in _halves(call):
        if name.endswith("keys") and spec.quantized and spec.dynamic:
            groups = spec.granularity.groups(width)
            if groups > 1:
                yield (
                    f"needs one dynamic scale a token and kv_head for {name} under a key map with "
                    f"feedback, got {groups}."
                )


def own_values(call: Call) -> Iterator[str]:
    """Values that are not the first channels of the keys."""
    if call.latent:
        yield "needs values of their own, got latent rows (MLA), which are keys as well."


def latent_rows(call: Call) -> Iterator[str]:
    """Values that are the first channels of the keys."""
    if not call.latent:
        yield "needs latent rows (MLA), got keys with values of their own."


# Channels and codes.


def channels(most: int, multiple: int = 1) -> Condition:
    """head_dims of keys and values."""
    divides = f" that is a multiple of {multiple}" if multiple > 1 else ""

    def condition(call: Call) -> Iterator[str]:
        for name, width in _widths(call):
            if width > most or width % multiple:
                yield f"needs a {name}{divides} up to {most}, got {width}."

    return condition


def one_width(*wanted: int) -> Condition:
    """The same head_dim of keys and values, one of ``wanted``."""

    def condition(call: Call) -> Iterator[str]:
        key, value = call.head_dim, call.value_head_dim
        if key != value or key not in wanted:
            yield (
                f"needs one head_dim of keys and values, {_either(tuple(map(str, wanted)))}, "
                f"got {key} and {value}."
            )

    return condition


def latent_widths(row: int, rotary: int) -> Condition:
    """Channels of latent rows and the rotary ones beside them; of other rows ``latent_rows`` says
    all."""

    def condition(call: Call) -> Iterator[str]:
        if call.latent and (call.head_dim, call.value_head_dim) != (row, rotary):
            yield (
                f"needs rows of {row} and {rotary} rotary channels, got {call.head_dim} and "
                f"{call.value_head_dim}."
            )

    return condition


def rows_for_tma(call: Call) -> Iterator[str]:
    """Rows of a 16-bit workspace that TMA can copy."""
    for name, width in _widths(call):
        if width % 8:
            yield f"needs rows of whole 16 bytes, which TMA copies, got a {name} of {width}."


def known_codes(*names: str) -> Condition:
    """Codes that compiled kernels have been told of."""

    def condition(call: Call) -> Iterator[str]:
        for name, spec, _ in _halves(call):
            code = spec.code
            if not code.known or (spec.quantized and code.name not in names):
                yield (
                    f"needs {_either(names)} codes of formats/spec for {name}, got {code.name} "
                    f"({code.qmin:g} to {code.qmax:g} in {code.storage})."
                )

    return condition


def codes(call: Call) -> Iterator[str]:
    """Quantized pages."""
    for name, spec, _ in _halves(call):
        if not spec.quantized:
            yield f"needs codes, got {name} as they come."


def one_code(call: Call) -> Iterator[str]:
    """The same code for keys and values."""
    key, value = call.format.key.code, call.format.value.code
    if key != value:
        yield f"needs one code for keys and values, got {key.name} and {value.name}."


def whole_words(call: Call) -> Iterator[str]:
    """Rows of codes that are read 32 bits at a time, planes of them 16."""
    for name, spec, width in _halves(call):
        size = 2 if spec.code.fields else 4
        if spec.quantized and width % (size * spec.code.step):
            yield f"needs {name} in whole {8 * size}-bit words, got a head_dim of {width}."


def pages_of_16_bits(call: Call) -> Iterator[str]:
    """Pages without codes in float16 or bfloat16."""
    for name, spec, _ in _halves(call):
        if not spec.quantized and call.dtype == torch.float32:
            yield f"needs pages of 16 bits for {name} without codes, got float32."


# Scales.


def short_scales(call: Call) -> Iterator[str]:
    """Dynamic scales in float16 or float32; given ones are brought there."""
    for name, spec, _ in _halves(call):
        if spec.quantized and spec.dynamic and spec.scale_dtype == torch.float64:
            yield f"needs scales of 16 or 32 bits for {name}, got float64."


def one_scale(call: Call) -> Iterator[str]:
    """At most one dynamic scale a token and kv_head."""
    for name, spec, width in _halves(call):
        groups = spec.granularity.groups(width) if spec.quantized and spec.dynamic else 1
        if groups > 1:
            yield f"needs one dynamic scale a token and kv_head for {name}, got {groups}."


def scales_of_tokens(call: Call) -> Iterator[str]:
    """Codes whose scales were computed of each token."""
    for name, spec, _ in _halves(call):
        if spec.quantized and not spec.dynamic:
            yield f"needs scales of each token for {name}, got given ones."


def no_zeros(call: Call) -> Iterator[str]:
    """Codes that are multiplied by a scale and no more."""
    for name, spec, _ in _halves(call):
        if spec.zero_point:
            yield f"needs {name} without zero points, got {spec.code.name} with them."


def no_exact_pages(call: Call) -> Iterator[str]:
    """Codes alone."""
    if call.format.exact_pages is not None:
        yield "needs a format without exact pages, got one that keeps some."


def groups_of_powers(call: Call) -> Iterator[str]:
    """Groups of channels with a scale that divide a tile of registers."""
    for name, spec, _ in _halves(call):
        group = spec.granularity.group
        if spec.quantized and spec.dynamic and group is not None and group & (group - 1):
            yield f"needs 16, 32, 64 .. channels with a scale for {name}, got {group}."


def _halves(call: Call) -> Iterator[tuple[str, QuantSpec, int]]:
    """Name, spec and head_dim of K and V, and of their near pages where those are codes."""
    for kind, given in (("", call.format), ("near ", call.format.near)):
        if given is not None:
            yield f"{kind}keys", given.key, call.head_dim
            yield f"{kind}values", given.value, call.value_head_dim


def _widths(call: Call) -> Iterator[tuple[str, int]]:
    yield "head_dim", call.head_dim
    yield "value_head_dim", call.value_head_dim


def _either(names: tuple[str, ...]) -> str:
    return " or ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


_16_BITS = (torch.float16, torch.bfloat16)
_ROWS: tuple[Condition, ...] = (
    known_codes("int8", "fp8", "int6", "int4", "int3"),
    device("cuda"),
    triton,
    short_scales,
)
_GPU = (*_ROWS, channels(256))
_NOT_OLD = (capability((8, 0), later=True), queries(*_16_BITS, torch.float32))
_ATTEND = (*_GPU, *_NOT_OLD, own_values)
_PREFILL_ON_HOPPER = (
    *_GPU, own_values, capability((9, 0), later=False), queries(*_16_BITS), rows_for_tma, gluon,
)  # fmt: skip
_DECODE = (
    *_ATTEND, phase("decode"), masks("causal", "full"), one_scale, whole_words, pages_of_16_bits,
)  # fmt: skip

NOTHING = refuse()
"""Plain torch, which serves every call."""
_CORE = (
    known_codes("int8", "fp8", "int6", "int4", "int3"),
    channels(512, multiple=16),
    queries(torch.float32, torch.bfloat16, torch.float16),
    short_scales,
)
CPU = refuse(*_CORE, first=(device("cpu"), core))
"""The compiled core, in every op."""
DECODE_TRITON = refuse(*_DECODE)
DECODE_GLUON = refuse(
    *_DECODE,
    known_codes("int8", "fp8", "int4"),
    capability((9, 0), later=False),
    codes,
    one_width(*HOPPER_WIDTHS),
    gluon,
)
PREFILL_TRITON = refuse(*_ATTEND, phase("prefill"), masks("causal", "full"))
PREFILL_GLUON = refuse(*_PREFILL_ON_HOPPER, phase("prefill"), masks("causal", "full"))
_LATENT = (
    known_codes("int8", "fp8"), device("cuda"), triton, capability((8, 0), later=True),
    queries(*_16_BITS, torch.float32), latent_rows, masks("causal", "full"), channels(512),
    short_scales, one_scale, scales_of_tokens, no_zeros, no_exact_pages, whole_words,
    pages_of_16_bits,
)  # fmt: skip
LATENT_TRITON = refuse(*_LATENT)
LATENT_GLUON = refuse(
    *_LATENT, capability((9, 0), later=False), codes, one_code,
    latent_widths(512, 64), gluon,
)  # fmt: skip
INTERVAL_TRITON = refuse(*_ATTEND, masks("interval"))
INTERVAL_GLUON = refuse(*_PREFILL_ON_HOPPER, phase("prefill"), masks("interval"))
WRITE_TRITON = refuse(*_ROWS, *_NOT_OLD, channels(512), whole_blocks_in_turn, groups_of_powers)
GATHER_TRITON = refuse(*_ROWS, *_NOT_OLD, channels(512))
