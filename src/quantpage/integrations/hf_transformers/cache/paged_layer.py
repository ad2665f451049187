"""One layer of a cache in quantized pages, as Transformers sees it.

Keys and values wait in ``PagedLayer.pending`` between ``update`` and attention, because only the
attention function knows which tokens are padding: padding is never written, so that a left-padded
row equals the same row alone.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
)

from quantpage.attention import AttentionBackend, LayerAttention, build_attention, find_backend
from quantpage.batch import BatchPlan
from quantpage.cache import PAGE_SIZES, CacheLayout, LayerKV, Reach
from quantpage.cache.counts import whole
from quantpage.errors import CacheError
from quantpage.formats import KeyMap, KVFormat, StaticScales, rotate
from quantpage.formats.per_layer import LayerFormats
from quantpage.hardware import device_info
from quantpage.integrations.hf_transformers.modules.coverage import Ledger
from quantpage.integrations.hf_transformers.pages.lazy import LazyKV, with_gradient
from quantpage.integrations.hf_transformers.pages.memory import Basis
from quantpage.integrations.hf_transformers.pages.rows import Rows
from quantpage.integrations.hf_transformers.pages.step import Step
from quantpage.masks import CausalMask, Mask
from quantpage.ops import attend, gather, rope_write
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import Call, choose
from quantpage.ops.rope_write import WriteParams


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What ``attach`` was asked for."""

    formats: LayerFormats
    page_size: int
    backend: AttentionBackend
    mask: Mask | None = None
    implementation: str | None = None
    checked: bool = False
    key_maps: Mapping[int, KeyMap] = field(default_factory=dict)
    """By layer; a layer without one caches keys as they are."""
    static: StaticScales | None = None
    """Of the layers with a static format, on the model's device."""
    own_state: frozenset[int] = frozenset()
    """Layers that stay Transformers' own though they cache keys and values (cross-attention)."""
    ledger: Ledger = field(default_factory=Ledger, compare=False)
    """Which layers read pages, noted as they run."""
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES or not isinstance(self.page_size, int):
            raise ValueError(f"page_size: expected one of {PAGE_SIZES}, got {self.page_size!r}")
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, 1)
        if not isinstance(self.mask, Mask | None):
            raise ValueError(f"mask: expected one of quantpage.masks, got {self.mask!r}")
        names = {each.name: None for each in (*attend.CANDIDATES, *rope_write.CANDIDATES)}
        if self.implementation not in (None, *names):
            raise ValueError(
                f"implementation: expected one of {', '.join(names)}; got {self.implementation!r}"
            )


class PagedLayer(CacheLayerMixin):
    """One layer of the cache, as Transformers sees it."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self, index: int, reach: Reach, kv_format: KVFormat, options: CacheOptions, rows: Rows
    ) -> None:
        super().__init__()
        self.index, self.reach = index, reach
        self.is_sliding = reach.limited
        self.length = 0
        """Tokens a row as Transformers counts them, padding included."""
        self._format, self._options, self._rows = kv_format, options, rows
        self._pending: tuple[Tensor, Tensor] | None = None
        self._had_gradient = False
        """Whether tokens were cached that a gradient was wanted of."""
        self._write_params = WriteParams(checked=options.checked, layer=index)
        self._chosen: dict[str, LayerAttention] = {}
        self.served: tuple[LayerAttention, AttendParams] | None = None
        """What served the newest step through Transformers' attention."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Lay out the pages; heads and channels are known only now (tensor parallelism)."""
        options = self._options
        self.dtype, self.device = key_states.dtype, key_states.device
        self.layout = CacheLayout(
            kv_heads=key_states.shape[1],
            head_dim=key_states.shape[-1],
            format=self._format,
            page_size=options.page_size,
            dtype=key_states.dtype,
            value_head_dim=value_states.shape[-1],
            latent=self.index in options.ledger.latent,
        )
        static = None
        if not self._format.dynamic:
            assert options.static is not None
            static = options.static.find(self.index).pairs
        basis = Basis(static, self._key_map())
        self._rows.add_layer(self.index, self.layout, self.reach, key_states, basis)
        self.is_initialized = True
        options.ledger.keep(self.index)

    def _key_map(self) -> KeyMap | None:
        """What is done to this layer's keys before they are cached."""
        found = self._options.key_maps.get(self.index)
        # Numbers that are kept as they are gain nothing.
        if found is None or not self.layout.format.key.quantized:
            return None
        wanted, got = (self.layout.kv_heads, self.layout.head_dim), tuple(found.scale.shape)
        if wanted != got:
            raise CacheError(
                f"layer {self.index}, key map: expected one of kv_heads, head_dim {wanted} as the "
                f"keys, got {got}"
            )
        return found.to(self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take [rows, kv_heads, new, head_dim] keys and values; hand back lazy ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._rows.begin(key_states.shape[0])
        self.flush()
        self._pending = (key_states.detach(), value_states.detach())
        self.length += key_states.shape[2]
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return self._differentiable(key_states, value_states)
        return (
            LazyKV(self, "key", key_states, self.length),
            LazyKV(self, "value", value_states, self.length),
        )

    def serve_densely(self, why: str) -> None:
        """Say that attention reads dense tensors instead of this layer's pages."""
        if self._options.mask is not None:
            raise ValueError(
                f"mask: expected a model whose layers all read pages, where masks are applied; "
                f"layer {self.index} attends densely because {why}"
            )
        self._options.ledger.serve_densely(self.index, why)

    def refuse_gradients(self) -> None:
        """ValueError where attention follows a mask that the model's own does not know."""
        if self._options.mask is not None:
            raise ValueError(
                "mask: expected a forward under torch.no_grad(), as gradients are those of the "
                "model's own attention, which does not know the mask"
            )

    def _differentiable(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """``update``'s answer as part of a graph, which no lazy tensor can be."""
        made = []
        for which, fresh in (("key", key_states), ("value", value_states)):
            dense = with_gradient(self.dequantized(which), fresh, self._had_gradient)
            dense.layer = self  # type: ignore[attr-defined]
            made.append(dense)
        self._had_gradient = True
        return made[0], made[1]

    def attend(self, query: Tensor, params: AttendParams, padding: Tensor | None) -> Tensor:
        """[rows, q_heads, new, head_dim] queries -> [rows, new, q_heads, value_head_dim]."""
        with self._rows.still():
            return self._attend(query, params, padding)

    def _attend(self, query: Tensor, params: AttendParams, padding: Tensor | None) -> Tensor:
        rows, q_heads, new, _ = query.shape
        params = self._own_mask(params)
        serving = self._serving(q_heads, query.dtype, params.mask)
        step = self._rows.step(self.length - new, new, padding)
        pages, batch = self._open(step, params.mask)
        self.served = serving, params
        written = self._write(step.pack(query), step, pages, serving)
        assert written is not None
        out = serving.attend_step(written, pages, batch, params, lse_wanted=False).out
        self._rows.close(self.index, step, self.reach, read=True)
        return step.unpack(out).view(rows, new, q_heads, -1)

    def attend_packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: int,
        params: AttendParams,
        padding: Tensor | None,
    ) -> Tensor:
        """``update`` and ``attend`` of [rows * new, heads, head_dim], padding included."""
        with self._rows.still():
            self._rows.begin(q.shape[0] // new)
            self.flush()
            return self._attend_packed((q, k, v), new, params, padding)

    def _attend_packed(
        self, qkv: tuple[Tensor, ...], new: int, params: AttendParams, padding: Tensor | None
    ) -> Tensor:
        q, k, v = qkv
        params = self._own_mask(params)
        serving = self._serving(q.shape[1], q.dtype, params.mask)
        step = self._rows.step(self.length, new, padding)
        self.length += new
        if step.keep is not None:
            q, k, v = q[step.keep], k[step.keep], v[step.keep]
        pages, batch = self._open(step, params.mask)
        written = serving.write_step(q, k, v, pages, batch, self._write_params)
        assert written.q is not None
        out = serving.attend_step(written.q, pages, batch, params, lse_wanted=False).out
        self._rows.close(self.index, step, self.reach, read=True)
        return step.unpack(out)

    def flush(self) -> None:
        """Write what waits, for a reader other than our attention function."""
        if self._pending is not None:
            with self._rows.still():
                self._flush(self._pending[0].shape[2])

    def _flush(self, new: int) -> None:
        assert self._pending is not None
        start = self.length - new
        step = self._rows.step(start, new, self._rows.told_padding(start, new))
        key, pages = self._pending[0], self._rows.open(self.index, step, self.reach)
        self._write(None, step, pages, self._serving(key.shape[1], key.dtype, CausalMask()))
        self._rows.close(self.index, step, self.reach, read=False)

    def dequantized(self, which: str) -> Tensor:
        """What the pages hold as [rows, kv_heads, length, head_dim], for foreign attention.

        Read from the codes even where a format keeps exact pages: a dense tensor cannot differ
        from query to query, and results must not depend on how the work was cut. Tokens that have
        left the layer's window are zeros.
        """
        with self._rows.still():
            return self._dequantized(which)

    def _dequantized(self, which: str) -> Tensor:
        self.flush()
        rows = self._rows
        view = rows.readable(self.index)
        pages = view.key if which == "key" else view.value
        wanted = self._options.implementation
        known = wanted in {each.name for each in gather.CANDIDATES}
        call = self._call(self.layout.kv_heads, self.dtype)
        gather_request = choose(gather.CANDIDATES, call, wanted if known else None).load()
        dense = torch.zeros(
            rows.count,
            self.length,
            pages.kv_heads,
            pages.head_dim,
            dtype=self.dtype,
            device=self.device,
        )
        for row, (table, places) in enumerate(rows.dense(self.index, self.reach, self.length)):
            found = gather_request(pages, table, len(places), torch.float32)
            if pages.spec.rotation == "hadamard":
                found = rotate(found)
            if which == "key" and view.key_map is not None:
                found = view.key_map.restored(found)
            dense[row, places] = found.to(self.dtype)
        # Foreign code may ask for a view of it that only contiguous tensors have.
        return dense.transpose(1, 2).contiguous()

    def in_core(self, q_heads: int, dtype: torch.dtype) -> bool:
        """Whether the compiled core both writes and attends, under no mask but the model's own."""
        if not self.is_initialized or self._options.mask is not None or self._options.checked:
            return False
        serving = self._serving(q_heads, dtype, CausalMask())
        return serving.write.name == serving.decode.name == "cpu" and self.dtype == dtype

    def fork(self, rows: Rows) -> "PagedLayer":
        """The same layer over other rows."""
        made = copy(self)
        made._rows = rows
        return made

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask has to cover, and the position of the first."""
        return self.length + int(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens a row, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of ``get_max_length`` up to Transformers 5.15."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.put_back((0, False))
        self._rows.clear()

    def mark(self) -> tuple[int, bool]:
        """What ``put_back`` needs, when nothing waits."""
        return self.length, self._had_gradient

    def put_back(self, mark: tuple[int, bool]) -> None:
        """Be as at ``mark``; what waits is dropped."""
        self._pending = None
        self.length, self._had_gradient = mark

    def _open(self, step: Step, mask: Mask) -> tuple[LayerKV, BatchPlan]:
        """The step's pages of this layer and its plan, for a mask that shows no more than them."""
        if self.is_sliding and self.length > step.new:
            start = step.start
            shown = mask.key_range(start, start + step.new - 1, start + step.new)[0]
            if shown < self.reach.first_seen(start):
                raise CacheError(
                    f"layer {self.index}: expected a mask that shows no token before "
                    f"{self.reach.first_seen(start)}, as those that left the layer's window are "
                    f"given back; got one that shows token {shown}"
                )
        pages = self._rows.open(self.index, step, self.reach)
        return pages, step.parts[self.reach].batch

    def _write(
        self, q: Tensor | None, step: Step, pages: LayerKV, serving: LayerAttention
    ) -> Tensor | None:
        """Write what waits, and bring the query into the basis of the cache."""
        if self._pending is None:
            # Written before (a layer that reads another's pages, gradients): the query alone.
            return None if q is None else pages.turned(q).to(q.dtype)
        k, v = self._pending
        written = serving.write_step(
            q, step.pack(k), step.pack(v), pages, step.parts[self.reach].batch, self._write_params
        )
        self._pending = None
        return written.q

    def _own_mask(self, params: AttendParams) -> AttendParams:
        """The mask that ``attach`` was given, in place of the model's causal rule."""
        if self._options.mask is None or params.mask != CausalMask():
            return params
        return replace(params, mask=self._options.mask)

    def _serving(self, q_heads: int, dtype: torch.dtype, mask: Mask) -> LayerAttention:
        found = self._chosen.get(mask.kind)
        if found is None:
            call = self._call(q_heads, dtype)
            options, backend = self._options, self._options.backend
            if mask is not options.mask and mask.kind not in backend.mask_kinds:
                # The model's own rule, whatever was asked for: chunks are intervals.
                backend = find_backend("flash_mask")
            found = build_attention(backend, mask, call, options.implementation)
            self._chosen[mask.kind] = found
        return found

    def _call(self, q_heads: int, dtype: torch.dtype) -> Call:
        """What dispatch is asked about this layer."""
        # Of the pages that are there, which may be those of a file.
        mapped = self._rows.layer(self.index).key_map
        return Call(
            device=device_info(self.device),
            format=self.layout.format,
            dtype=dtype,
            q_heads=q_heads,
            kv_heads=self.layout.kv_heads,
            head_dim=self.layout.head_dim,
            value_head_dim=self.layout.v_dim,
            page_size=self.layout.page_size,
            in_turn=mapped is not None and mapped.feedback is not None,
            latent=self.layout.latent,
        )
