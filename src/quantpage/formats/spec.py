"""What a cached number means: code x scale (+ zero), and who shares a scale.

Independent facts are independent small values: a ``Code`` says how one number is stored, a
``Granularity`` says who owns a scale, a ``QuantSpec`` joins them for K or for V, a ``KVFormat``
joins a key spec and a value spec. Impossible combinations fail when they are built.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from quantpage.errors import FormatError


@dataclass(frozen=True, slots=True)
class Code:
    """An integer (or e4m3 bit pattern) that stands for a number.

    Raises FormatError for what no storage holds.
    """

    name: str
    """As in CODES; 'none' for numbers kept as they are."""
    storage: torch.dtype | None
    """Tensor dtype of the codes; None: the model's own dtype."""
    qmin: float
    """Smallest code with a zero point; symmetric codes use -qmax."""
    qmax: float
    """Largest code."""
    bits: int
    """Bits a number takes in memory, unused ones with it: 8 for a code of -16..15 in int8 bytes.
    16 is assumed for 'none' where a model's dtype is not known."""
    values_per_byte: int = 1
    """2 for int4: byte b of a row holds channel 2b in its low nibble, 2b+1 in its high one."""
    fields: tuple[int, ...] = ()
    """Bits of each plane of a row, the lowest first, for codes of no power of two: 4 and 2 for
    int6. The low 4 bits of all channels come first, then the high 2; a plane of w bits takes
    B = w / 8 of a byte a channel, and its byte b holds channels b, b + B, b + 2 B and so on from
    its lowest bits up, so that a mask leaves neighbours in neighbouring bytes."""

    def __post_init__(self) -> None:
        if self.storage is None:
            return
        if self.fields:
            self._check_fields()
            return
        held = _HELD.get((self.storage, self.values_per_byte))
        if held is None:
            raise FormatError(
                f"code {self.name}: expected int8 or float8_e4m3fn with one value a byte, or uint8 "
                f"with two, got {self.storage} with {self.values_per_byte}"
            )
        # Symmetric codes reach from -qmax to qmax.
        if not (held[0] <= min(self.qmin, -self.qmax) and 0 < self.qmax <= held[1]) or (
            self.qmin >= 0
        ):
            raise FormatError(
                f"code {self.name}: expected qmin..qmax around 0 within {held[0]}..{held[1]} of "
                f"{self.storage}, got {self.qmin}..{self.qmax}"
            )
        if self.bits * self.values_per_byte != 8:
            raise FormatError(
                f"code {self.name}: expected the {8 // self.values_per_byte} bits that a number "
                f"takes in {self.storage}, got {self.bits}"
            )

    def _check_fields(self) -> None:
        half = 1 << (self.bits - 1)
        whole = sum(self.fields) == self.bits <= 8 and set(self.fields) <= {1, 2, 4}
        if not whole or self.storage != torch.uint8 or self.values_per_byte != 1:
            raise FormatError(
                f"code {self.name}: expected planes of 1, 2 or 4 bits that are {self.bits} bits "
                f"together in torch.uint8, got {self.fields} in {self.storage}"
            )
        if not (-half <= min(self.qmin, -self.qmax) and 0 < self.qmax < half and self.qmin < 0):
            raise FormatError(
                f"code {self.name}: expected qmin..qmax around 0 within {-half}..{half - 1}, got "
                f"{self.qmin}..{self.qmax}"
            )

    @property
    def step(self) -> int:
        """Channels that take whole bytes: a row is a multiple of so many."""
        return 8 // min(self.fields) if self.fields else self.values_per_byte

    def stored(self, channels: int) -> int:
        """Elements of ``storage`` that a row of so many channels takes."""
        return channels * self.bits // 8 if self.fields else channels // self.values_per_byte

    def channels(self, stored: int) -> int:
        """Channels of a row of so many elements of ``storage``."""
        return stored * 8 // self.bits if self.fields else stored * self.values_per_byte

    @property
    def integer(self) -> bool:
        """True for whole numbers: evenly spaced, rounded half to even."""
        return not (self.exact or self.is_float)

    @property
    def exact(self) -> bool:
        """True when numbers are stored as they are, without codes."""
        return self.storage is None

    @property
    def is_float(self) -> bool:
        """True for codes that are floats themselves: cast, never rounded to integers."""
        return self.storage == torch.float8_e4m3fn

    @property
    def known(self) -> bool:
        """True for the codes of this module, the only ones that compiled kernels have been told."""
        return self == _KNOWN.get(self.name)


_HELD: dict[tuple[torch.dtype, int], tuple[int, int]] = {
    (torch.int8, 1): (-128, 127),
    (torch.float8_e4m3fn, 1): (-448, 448),
    (torch.uint8, 2): (-8, 7),
}
"""Storage and values a byte -> the codes that it holds."""

CODES = {
    "none": Code("none", None, 0, 0, 16),
    "int8": Code("int8", torch.int8, -128, 127, 8),
    "fp8": Code("fp8", torch.float8_e4m3fn, -448, 448, 8),
    "int6": Code("int6", torch.uint8, -32, 31, 6, fields=(4, 2)),
    "int4": Code("int4", torch.uint8, -8, 7, 4, values_per_byte=2),
    "int3": Code("int3", torch.uint8, -4, 3, 3, fields=(2, 1)),
}
_KNOWN = dict(CODES)


@dataclass(frozen=True, slots=True)
class Granularity:
    """Who owns a scale.

    ====================================  =============  ==============================
    granularity                           dynamic plane  static tensor
    ====================================  =============  ==============================
    Granularity()  a token and kv_head    [.., 1]        [kv_heads, 1]  (a kv_head)
    Granularity(group=32), head_dim 128   [.., 4]        [kv_heads, 4]
    Granularity(group=1)                  refused        [kv_heads, head_dim] (a channel)
    Granularity(per_head=False)           refused        [1, 1]  (a tensor)
    ====================================  =============  ==============================

    where ".." is pages, kv_heads, page_size. Raises FormatError for a group below 1.
    """

    group: int | None = None
    """Channels that share a scale; None: all channels of a head."""
    per_head: bool = True
    """False: one scale for all kv_heads (static scales only)."""

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise FormatError(f"group: expected at least 1 channel, got {self.group}")

    def groups(self, head_dim: int) -> int:
        """Scales that one token of one head needs (dynamic) or one head (static).

        Raises FormatError where a group does not divide head_dim.
        """
        if self.group is None:
            return 1
        if head_dim % self.group:
            raise FormatError(f"group: expected a divisor of head_dim {head_dim}, got {self.group}")
        return head_dim // self.group

    def scale_shape(self, kv_heads: int, head_dim: int) -> tuple[int, int]:
        """Shape of a static scale tensor."""
        return (kv_heads if self.per_head else 1, self.groups(head_dim))


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How K, or V, of one layer is quantized: ``number = scale * code + zero``.

    Raises FormatError for facts that exclude each other.
    """

    code: Code
    granularity: Granularity = field(default_factory=Granularity)
    dynamic: bool = True
    """True: scales are computed when a token is written; False: given once (StaticScales)."""
    zero_point: bool = False
    """True: each scale has a zero, the number that code 0 stands for."""
    rotation: Literal["none", "hadamard"] = "none"
    """Basis in which numbers are cached; see formats/rotate."""
    scale_dtype: torch.dtype = torch.float16
    """Codes are computed from the scale *after* it is rounded to this dtype."""

    def __post_init__(self) -> None:
        if self.code.exact:
            if self.zero_point or self.rotation != "none":
                raise FormatError("code none: numbers kept as they are take no zero or rotation")
            return
        if self.rotation not in ("none", "hadamard"):
            raise FormatError(f"rotation: expected none or hadamard, got {self.rotation!r}")
        if self.zero_point and self.code.is_float:
            raise FormatError(
                f"zero_point: {self.code.name} codes are signed floats; a zero point adds nothing"
            )
        if self.dynamic and not self.granularity.per_head:
            raise FormatError("granularity: a dynamic scale belongs to one token and kv_head")
        if self.dynamic and self.granularity.group is not None and self.granularity.group < 16:
            raise FormatError(
                f"granularity: a dynamic group needs at least 16 channels, "
                f"got {self.granularity.group}"
            )
        if self.scale_dtype not in (torch.float16, torch.float32, torch.float64):
            raise FormatError(
                f"scale_dtype: expected float16, float32 or float64, got {self.scale_dtype}"
            )

    @property
    def quantized(self) -> bool:
        """False for the 'none' code."""
        return not self.code.exact

    def bits_per_value(self, head_dim: int) -> float:
        """Bits a cached number takes in the body, its share of scale and zero counted."""
        if not self.quantized or not self.dynamic:
            return float(self.code.bits)
        scales = self.granularity.groups(head_dim) * (2 if self.zero_point else 1)
        return self.code.bits + scales * self.scale_dtype.itemsize * 8 / head_dim


@dataclass(frozen=True, slots=True)
class ExactPages:
    """Keys and values that a query sees unquantized, by position alone.

    Query i sees the first page of its request, the page that i itself stands in and the page
    before that one as they were computed; every other page through its codes. So the last page's
    worth of tokens is always exact. The rule (``exact_pairs`` in ops/attend/params) knows no chunk
    and no batch, so results do not depend on how the work was cut. It costs at most
    ``kept_pages`` 16-bit pages a request beside the codes.
    """

    kept_pages: ClassVar[int] = 4
    """First page, the page in progress, and the two before it (one that its queries see, and one
    more so that a rejected draft of up to a page of tokens can be rolled back). Sequence keeps no
    more, whatever a format says: it is a fact of the rule, not a setting."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """A named pair of specs: how K and how V of a layer are cached.

    Raises FormatError for halves that exclude each other.
    """

    name: str
    key: QuantSpec
    value: QuantSpec
    exact_pages: ExactPages | None = None
    """Positions kept in 16 bits as well; None: every query reads codes only."""
    summary: str = field(default="", compare=False)
    """One line for `quantpage formats`."""
    near: "KVFormat | None" = None
    """How exact pages are kept; None: in 16 bits, as the model computes. A finer format than the
    body's halves their bytes, in the basis that the body has."""

    def __post_init__(self) -> None:
        if self.exact_pages is not None and not self.quantized:
            raise FormatError(f"{self.name}: exact_pages need a quantized format")
        if self.near is not None:
            self._check_near(self.near)

    def _check_near(self, near: "KVFormat") -> None:
        if self.exact_pages is None:
            raise FormatError(f"{self.name}: near needs exact_pages, whose codes it says")
        if near.exact_pages is not None or near.near is not None:
            raise FormatError(f"{self.name}, near: expected a format without exact_pages")
        for half, body, own in (("key", self.key, near.key), ("value", self.value, near.value)):
            if not (own.quantized and own.dynamic):
                raise FormatError(
                    f"{self.name}, near: expected a {half} with codes and scales of its own, got "
                    f"{near.name}"
                )
            if own.code.bits < body.code.bits:
                raise FormatError(
                    f"{self.name}, near: expected a {half} of at least the body's {body.code.bits} "
                    f"bits, got {own.code.bits}"
                )
            if body.rotation != own.rotation:
                raise FormatError(
                    f"{self.name}, near: expected a {half} in the basis of the body, rotation "
                    f"{body.rotation!r}, got {own.rotation!r}"
                )

    @property
    def quantized(self) -> bool:
        """False when neither K nor V has codes."""
        return self.key.quantized or self.value.quantized

    @property
    def dynamic(self) -> bool:
        """True when no scale has to be given from outside."""
        return all(spec.dynamic or not spec.quantized for spec in (self.key, self.value))
