"""The shape and the size of one layer's pages. The allocator and the capacity planner ask the same
object, so that what is planned is what is allocated.
"""

from dataclasses import dataclass, replace

import torch

from quantpage.cache.counts import whole
from quantpage.errors import FormatError
from quantpage.formats import CODES, KVFormat, QuantSpec

_AS_COMPUTED = KVFormat("none", QuantSpec(CODES["none"]), QuantSpec(CODES["none"]))

PAGE_SIZES = (16, 32, 64, 128, 256)
"""Tokens a page may hold. Default 64; 16 inside an engine that wants it."""

MODEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""In which a model may compute."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """One layer's pages, K and V, with named dimensions.

    Raises ValueError for sizes that cannot be, FormatError where a format does not fit head_dim.
    """

    kv_heads: int
    head_dim: int
    """Channels of a key."""
    format: KVFormat
    page_size: int = 64
    """Tokens a page."""
    dtype: torch.dtype = torch.bfloat16
    """The model's dtype: what 'none' codes and exact pages are kept in."""
    value_head_dim: int | None = None
    """Channels of a value; None: as a key."""
    latent: bool = False
    """Multi-head latent attention: keys and values of a token are made of one latent row, which is
    what ``head_dim`` and the format's key describe; ``value_head_dim`` and its value describe the
    rotary channels that a key has besides (``LayerKV.latent``)."""

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size: expected one of {PAGE_SIZES}, got {self.page_size}")
        for name in ("kv_heads", "head_dim", "page_size"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        if self.value_head_dim is not None:
            width = whole("value_head_dim", self.value_head_dim, 1)
            object.__setattr__(self, "value_head_dim", width)
        if not isinstance(self.format, KVFormat):
            raise ValueError(f"format: expected a KVFormat (find_format), got {self.format!r}")
        if self.dtype not in MODEL_DTYPES:
            said = ", ".join(map(str, MODEL_DTYPES))
            raise ValueError(f"dtype: expected that of a model, one of {said}, got {self.dtype}")
        for spec, width in ((self.format.key, self.head_dim), (self.format.value, self.v_dim)):
            spec.granularity.groups(width)
            if width % spec.code.step:
                wanted = (
                    "an even number" if spec.code.step == 2 else f"a multiple of {spec.code.step}"
                )
                raise FormatError(
                    f"head_dim: expected {wanted} for {spec.code.name} codes, got {width}"
                )

    @property
    def v_dim(self) -> int:
        """Channels of a value."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    def codes_shape(self, spec: QuantSpec, width: int, pages: int) -> tuple[int, int, int, int]:
        """[pages, kv_heads, page_size, row]."""
        return (pages, self.kv_heads, self.page_size, spec.code.stored(width))

    def scale_shape(self, spec: QuantSpec, width: int, pages: int) -> tuple[int, int, int, int]:
        """[pages, kv_heads, page_size, groups]; dynamic scales only."""
        return (pages, self.kv_heads, self.page_size, spec.granularity.groups(width))

    def bytes_per_token(self) -> int:
        """Bytes that one cached token of this layer takes, scales and zeros counted."""
        return self._token_bytes(self.format.key, self.head_dim) + self._token_bytes(
            self.format.value, self.v_dim
        )

    def bytes_per_page(self) -> int:
        """Bytes of one page of this layer."""
        return self.page_size * self.bytes_per_token()

    def exact_bytes_per_page(self) -> int:
        """Bytes of one page kept exact, 0 for formats that keep none."""
        near = self.near
        return 0 if near is None else near.bytes_per_page()

    @property
    def near(self) -> "CacheLayout | None":
        """The layout of exact pages: 'none', or what the format says; None where there are none."""
        if self.format.exact_pages is None:
            return None
        return replace(self, format=self.format.near or _AS_COMPUTED)

    def exact_bytes_per_request(self) -> int:
        """The most that a request's exact pages take beside its codes."""
        kept = self.format.exact_pages
        return 0 if kept is None else kept.kept_pages * self.exact_bytes_per_page()

    def unquantized_bytes_per_token(self) -> int:
        """Bytes of the same token in the model's own dtype."""
        return self.kv_heads * (self.head_dim + self.v_dim) * self.dtype.itemsize

    def _token_bytes(self, spec: QuantSpec, width: int) -> int:
        itemsize = (spec.code.storage or self.dtype).itemsize
        codes = self.kv_heads * spec.code.stored(width) * itemsize
        if not spec.quantized or not spec.dynamic:
            return codes
        planes = 2 if spec.zero_point else 1
        groups = spec.granularity.groups(width)
        return codes + planes * self.kv_heads * groups * spec.scale_dtype.itemsize
