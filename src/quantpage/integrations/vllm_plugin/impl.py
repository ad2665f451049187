"""One layer in vLLM: views over its memory, then write and attend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from quantpage.attention import LayerAttention, build_attention, find_backend
from quantpage.batch import BatchPlan
from quantpage.cache import CacheLayout, LayerKV
from quantpage.cache.cells import layer_of_cells
from quantpage.errors import CorruptCalibration, NoImplementation
from quantpage.formats import KeyMap, KVFormat
from quantpage.formats.scales import ScalePair
from quantpage.hardware import device_info
from quantpage.integrations.vllm_plugin import compat
from quantpage.integrations.vllm_plugin.exact_layer import SUFFIX, ExactPagesLayer
from quantpage.integrations.vllm_plugin.formats import (
    CALIBRATION,
    LONG_CHUNK,
    check_additional,
    check_block_size,
    exact_page,
    exact_token_bytes,
    format_of,
    refuse_layer,
    wants_warm_up,
)
from quantpage.integrations.vllm_plugin.maps import (
    find_calibration,
    key_map,
    warn_without_maps,
    worker_heads,
)
from quantpage.integrations.vllm_plugin.parts import Part
from quantpage.integrations.vllm_plugin.working import most_pages
from quantpage.masks import CausalMask, FullMask, Mask
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import Call
from quantpage.ops.rope_write import WriteParams
from quantpage.warm_up import Asked, Sizes, warm_up

# vLLM's models rotate queries and keys themselves.
_WRITE = WriteParams()


@dataclass(frozen=True, slots=True)
class Served:
    """The one quantized format of this process.

    vLLM asks a class method of the backend for the bytes of a page and hands it no name of a
    format; layers are made before.
    """

    form: KVFormat
    dtype: torch.dtype
    """The model's."""
    block_size: int = 0
    """Tokens of a block; 0: not known yet."""

    last: ClassVar["Served | None"] = None


class QuantPageImpl(AttentionImpl):
    """One layer."""

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None,
        sliding_window=None, kv_cache_dtype="auto", logits_soft_cap=None,
        attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, sinks=None, **unknown,
    ):  # fmt: skip
        self.config = get_current_vllm_config()
        additional = self.config.additional_config
        check_additional(additional, self.config.cache_config.cache_dtype)
        self.form = format_of(kv_cache_dtype, additional, compat.takes_own_names())
        self.shared = kv_sharing_target_layer_name is not None
        self.keys_of: str | None = kv_sharing_target_layer_name
        """The layer whose keys are read, where they are another's."""
        refuse_layer(
            self.form,
            alibi=alibi_slopes is not None,
            attn_type=str(getattr(attn_type, "value", attn_type)),
            shared=self.shared,
            unknown=[name for name, given in unknown.items() if given is not None],
            skips=compat.skips_layers(self.config),
            one_group=bool(self.config.scheduler_config.disable_hybrid_kv_cache_manager),
            drafts=compat.drafts_by_model(self.config),
        )
        if self.form.exact_pages is not None and not compat.holds_exact_pages():
            raise NoImplementation(
                f"QuantPage cannot serve {self.form.name} in vLLM before 0.32, whose blocks hold "
                "no exact pages; int8 and fp8 can be served."
            )
        # Names that vLLM's own code reads.
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window, self.sinks = sliding_window, sinks
        self.dtype = torch.get_default_dtype()
        self.softcap = logits_soft_cap or None
        if self.form.quantized:
            Served.last = Served(self.form, self.dtype)
        self._key_map: KeyMap | None = None
        asked = wants_warm_up(additional)
        self._warm = not asked or compat.on_cpu() or not compat.runs_first_steps(self.config)
        """Whether kernels are compiled, or will be when requests ask for them."""
        self._companion: ExactPagesLayer | None = None
        self._companion_name = ""
        self._view: LayerKV | None = None
        self._layout: CacheLayout | None = None
        self._pool: Tensor | None = None
        """vLLM's exact pages, as cells."""
        self._view_of: tuple[object, ...] = ()
        self._built: dict[tuple[bool, int], tuple[LayerAttention, AttendParams]] = {}

    def process_weights_after_loading(self, act_dtype):
        """Refuse what cannot run; stand a layer for the exact pages beside this one.

        vLLM asks layers for their specs after this, and sink logits have their numbers only now.
        """
        layers = self.config.compilation_config.static_forward_context
        (name,) = [each for each, layer in layers.items() if getattr(layer, "impl", None) is self]
        self._built.clear()
        block_size = self.config.cache_config.block_size
        check_block_size(block_size)
        if self.form.quantized:
            Served.last = Served(self.form, self.dtype, block_size)
        self._key_map = self._find_map(self.keys_of or name)
        widths = (self.head_size, layers[name].head_size_v)
        self._attention(True, widths, 64, compat.device())
        if self.form.exact_pages is None or self._companion is not None:
            return
        page = exact_page(self.form, block_size, widths, self.dtype)
        size = exact_token_bytes(self.form, widths, self.dtype)
        self._companion = ExactPagesLayer(layers[name], widths, page, size)
        self._companion_name = name + SUFFIX
        layers[self._companion_name] = self._companion

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
        output_block_scale=None,
    ):  # fmt: skip
        """Write the step's keys and values, and attend into ``output``.

        query [tokens, q_heads, head_dim], key and value [tokens, kv_heads, ..]: their first rows
        are the step's, the rest is padding. All rows are written before any is read: a request may
        hit a page that another one fills in this step.
        """
        if attn_metadata is None:
            # vLLM measures how much memory the rest of a model takes.
            self._allocate_working(query)
            return output.fill_(0)
        view = self._views(layer, kv_cache)
        widths = view.key.head_dim, view.value.head_dim
        attention, params = self._attention(
            attn_metadata.causal, widths, view.page_size, view.device
        )
        if not self._warm:
            self._warm_up(attention, params, view, attn_metadata.plan)
        if self._companion is not None:
            near = get_forward_context().attn_metadata[self._companion_name]
            self._forward_exact(
                attn_metadata.with_exact(near), (query, key, value), output, (attention, params)
            )
            return output
        plan = attn_metadata.plan
        tokens = plan.num_tokens
        q = query[:tokens]
        if key is not None and not self.shared:
            q = attention.write_step(q, key[:tokens], value[:tokens], view, plan, _WRITE).q
        else:
            q = view.turned(q).to(q.dtype)
        attention.attend_step(q, view, plan, params, lse_wanted=False, out=output[:tokens])
        return output

    def _forward_exact(
        self,
        parts: Sequence[Part],
        qkv: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        by: tuple[LayerAttention, AttendParams],
    ) -> None:
        """A step over exact pages too, long chunks in working pages of this layer."""
        attention, params = by
        view, pool, layout = self._view, self._pool, self._layout
        assert view is not None and pool is not None and layout is not None
        opened = [
            (None, view) if part.working is None else part.working.open(pool, view, layout)
            for part in parts
        ]
        queries = []
        for part, (_, pages) in zip(parts, opened, strict=True):
            q, k, v = (each[part.rows] for each in qkv)
            written = attention.write_step(q, k, v, pages, part.plan, _WRITE)
            assert written.q is not None
            queries.append(written.q)
        working = [
            (part.working, cells)
            for part, (cells, _) in zip(parts, opened, strict=True)
            if part.working is not None and cells is not None
        ]
        for own, cells in working:
            own.keep(cells, pool)
        for own, cells in working:
            own.bring(pool, cells)
        for part, (_, pages), q in zip(parts, opened, queries, strict=True):
            attention.attend_step(
                q, pages, part.plan, params, lse_wanted=False, out=output[part.rows]
            )

    def _warm_up(
        self, attention: LayerAttention, params: AttendParams, view: LayerKV, like: BatchPlan
    ) -> None:
        """Compile what requests will need, in the first step that vLLM runs by itself."""
        self._warm = True
        if torch.cuda.is_current_stream_capturing():
            return
        scheduler, config = self.config.scheduler_config, self.config
        sizes = Sizes(
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens,
            config.model_config.max_model_len,
            config.num_speculative_tokens,
        )
        with warm_up(view.device) as warm:
            warm.ask(Asked(attention, view, params, like), sizes)

    def _find_map(self, name: str) -> KeyMap | None:
        """What is done to the keys of the layer ``name`` before they are cached."""
        model = self.config.model_config
        path = (self.config.additional_config or {}).get(CALIBRATION)
        if path is None:
            warn_without_maps(model.model, self.form)
            return None
        if not self.form.key.quantized:
            return None
        heads = model.get_total_num_kv_heads()
        own = worker_heads(heads, *compat.tensor_parallel())
        found = find_calibration(path, model.model)
        made = key_map(
            found, path, compat.layer_index(name), self.form, (heads, self.head_size), own
        )
        if made is not None and made.mean is not None and self.softcap is not None:
            raise CorruptCalibration(
                f"{path}: expected maps without means for a model with capped scores, got means"
            )
        return None if made is None else made.to(compat.device())

    def _allocate_working(self, query: Tensor) -> None:
        """Take what a step of so many tokens works in, and let it go: so vLLM counts it."""
        if self._companion is not None:
            near, most = self._companion, query.shape[0]
            pages = most_pages(most, most // LONG_CHUNK + 1, near.page)
            size = pages * self.num_kv_heads * near.page * near.token_bytes
            torch.empty(size, dtype=torch.uint8, device=query.device)

    def _views(self, layer, kv_cache: Tensor) -> LayerKV:
        """Over vLLM's memory, made anew when it moves: after profiling, after sleep."""
        near = None if self._companion is None else self._companion.kv_cache
        found = (_place(kv_cache), None if near is None else _place(near))
        if self._view is None or found != self._view_of:
            static: tuple[ScalePair, ScalePair] | None = None
            if not self.form.dynamic:
                key, value = (each.view(1, 1) for each in (layer._k_scale, layer._v_scale))
                static = (key, None), (value, None)
            layout = CacheLayout(
                self.num_kv_heads, self.head_size, self.form, kv_cache.shape[2], self.dtype,
                layer.head_size_v,
            )  # fmt: skip
            self._pool = None if near is None else _cells(near)
            self._layout = layout
            view = layer_of_cells(_cells(kv_cache), layout, static, self._pool)
            self._view = replace(view, key_map=self._key_map)
            self._view_of = found
        return self._view

    def _attention(
        self, causal: bool, widths: tuple[int, int], page_size: int, device: torch.device
    ) -> tuple[LayerAttention, AttendParams]:
        """Chosen once; NoImplementation where nothing but plain torch would serve a GPU."""
        found = self._built.get((causal, page_size))
        if found is not None:
            return found
        if not causal and self.sliding_window is not None:
            raise NoImplementation(
                f"QuantPage serves sliding windows (here {self.sliding_window} tokens) in causal "
                "steps, got one in which new tokens see those after them."
            )
        mask: Mask = CausalMask(window=self.sliding_window) if causal else FullMask()
        call = Call(
            device_info(device), self.form, self.dtype, self.num_heads, self.num_kv_heads, *widths,
            page_size, in_turn=self._key_map is not None and self._key_map.feedback is not None,
        )  # fmt: skip
        attention = build_attention(find_backend("flash"), mask, call)
        chosen = (attention.write, attention.prefill, attention.decode)
        if device.type != "cpu" and any(each.name == "torch" for each in chosen):
            # Plain torch reads lengths from the host, which a graph's replay does not bring.
            reasons = [
                f"{each.name}: {' '.join(each.refusals(attention.call))}"
                for each in chosen
                if each.refusals(attention.call)
            ]
            raise NoImplementation(
                f"no kernel serves format {self.form.name} with head_dim {widths[0]} in "
                f"{self.dtype} on {call.device.name}. {' '.join(reasons)}".rstrip()
            )
        sinks = None if self.sinks is None else self.sinks.detach().float()
        made = attention, AttendParams(self.scale, mask, self.softcap, sinks)
        self._built[causal, page_size] = made
        return made


def _place(kv_cache: Tensor) -> tuple[object, ...]:
    """What views over a cache depend on."""
    return kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride()


def _cells(kv_cache: Tensor) -> Tensor:
    """uint8 [pages, kv_heads, bytes] of vLLM's [pages, kv_heads, page_size, content]."""
    pages, heads, size, content = kv_cache.shape
    if kv_cache.stride()[2:] != (content, 1):
        raise ValueError(
            f"kv_cache: expected the tokens of a block and head side by side, strides "
            f"({content}, 1), got {kv_cache.stride()[2:]}"
        )
    flat = kv_cache.as_strided((pages, heads, size * content), (*kv_cache.stride()[:2], 1))
    return flat.view(torch.uint8)
