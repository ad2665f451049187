"""A step on a CPU: linear layers, blocks and whole decoders by the compiled core.

``nn.Linear`` of a few tokens is bound by reading its weights, which torch does at a third of the
memory's speed. Every linear layer of an attached model asks the core instead. A block whose code is
Llama's is four calls: projections with norm and rotary embedding, the write, attention, and the
rest; and a decoder of such blocks (Llama, Mistral, Qwen 2) runs them in one call, with nothing of
the model's own code around it, prompts too. Training and whatever the core does not know run that
code.
"""

import sys
from collections.abc import Callable
from copy import copy
from itertools import chain, repeat
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_outputs import BaseModelOutputWithPast

from quantpage.cpu_core import find_core
from quantpage.cpu_core.asked import Asked
from quantpage.cpu_core.decoder import Block, Decoder
from quantpage.cpu_core.products import (
    MAX_TOKENS,
    Matrix,
    Norm,
    Projection,
    Rotary,
    SecondHalf,
    most_tokens,
)
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.cache.paged_layer import PagedLayer
from quantpage.integrations.hf_transformers.hooks import functions
from quantpage.integrations.hf_transformers.modules.arguments import (
    cache_name,
    parameters,
    take_cache,
)
from quantpage.integrations.hf_transformers.modules.llama_like import (
    is_linear,
    is_llama_block,
    is_llama_model,
    is_llama_norm,
    is_still_rotary,
    replace_forward,
    window_of,
)


def install(model: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Give the model's linear layers and blocks a ``forward`` that asks the core first.

    undo: is given what takes each of them back.
    """
    if find_core() is None or any(not each.is_cpu for each in model.parameters()):
        return
    # Somebody else's forward (accelerate moves weights in it) is kept, and so is what holds it.
    kept = {each for each in model.modules() if "forward" in vars(each)}
    for module in model.modules():
        if is_linear(module) and module not in kept:
            replace_forward(module, _Linear(module), undo)
        elif is_llama_block(module) and kept.isdisjoint(module.modules()):
            replace_forward(module, _Block(module), undo)
    for module in model.modules():
        if is_llama_model(module) and kept.isdisjoint(module.modules()):
            layers: Any = module.layers
            blocks = [vars(each)["forward"] for each in layers]
            if len({each.block()[2:5] for each in blocks}) == 1:
                replace_forward(module, _Model(module, blocks), undo)


_TOLD = ("variance_epsilon", "scaling", "head_dim", "is_causal")
"""Numbers of modules that the core is told once."""
_CALLED = ("apply_rotary_pos_emb", "rotate_half")
"""Functions of a model's file that its code calls, and the core does not."""
_READ = ("is_causal", "sliding_window", "layer_types")
"""What a model's own code reads of its configuration at every forward, as to who sees whom."""


class _Parts:
    """Everything that hangs in a module, to notice that somebody hung something else there, changed
    a number or gave an inner module another forward."""

    def __init__(self, module: nn.Module) -> None:
        each = list(module.modules())
        inner = [one for one in each if one is not module]
        places = (p for one in each for p in (one._modules, one._parameters, one._buffers))
        self._places: list[dict[str, Any]] = [place for place in places if place]
        self._held = [part for place in self._places for part in place.values()]
        self._hooks = [p for one in inner for p in (one._forward_hooks, one._forward_pre_hooks)]
        self._inner = list(map(vars, inner))
        told = [(own, n, own[n]) for own in map(vars, each) for n in _TOLD if n in own]
        configs = {id(own["config"]): own["config"] for own in map(vars, each) if "config" in own}
        read = [(vars(one), name) for one in configs.values() for name in _READ]
        told += [(own, name, copy(own.get(name))) for own, name in read]
        kinds: set[Any] = {*map(type, each)}
        self._code: list[tuple[Any, Any]] = [(kind, kind.forward) for kind in kinds]
        files = [vars(sys.modules[name]) for name in {kind.__module__ for kind in kinds}]
        told += [(file, n, file[n]) for file in files for n in _CALLED if n in file]
        self._owners = [own for own, _, _ in told]
        self._names = [name for _, name, _ in told]
        self._numbers = [number for _, _, number in told]

    def asked(self) -> Asked:
        """What a look at all of it reads."""
        return Asked([*self._held, *self._hooks], [*self._places, *self._inner])

    def same(self) -> bool:
        """Whether all of it is still there."""
        # In C throughout: a decoder has a thousand parts, and is asked at every step.
        return (
            all(map(is_, chain.from_iterable(map(dict.values, self._places)), self._held))
            and all(map(eq, map(dict.get, self._owners, self._names), self._numbers))
            and all(kind.forward is code for kind, code in self._code)
            and _OURS.issuperset(map(type, map(dict.get, self._inner, repeat("forward"))))
        )

    def watched(self) -> bool:
        """Whether a hook waits for a call of some inner module, or of any module there is."""
        return any(self._hooks) or _has_any_global_hook()


def _served_here(x: Tensor, weight: Tensor, most: int | None) -> bool:
    """Whether this is a step of at most so many tokens, without gradients or a graph."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.numel() > 0
        and (most is None or x.numel() <= most * x.shape[-1])
        and not (torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        # Somebody counts or records what torch does (FlopCounterMode).
        and not _len_torch_dispatch_stack()
    )


def matrix_of(module: Any) -> Matrix:
    """What a linear layer multiplies by."""
    return Matrix(module.weight, getattr(module, "scale", None), module.bias)


class _Linear:
    """``forward`` of a linear layer."""

    def __init__(self, module: Any) -> None:
        self._module, self._parts = module, _Parts(module)
        self._matrix = matrix_of(module)
        self._product = Projection([self._matrix])

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        weight = self._matrix.weight
        if (
            _served_here(x, weight, MAX_TOKENS)
            and x.shape[-1] == weight.shape[1]
            and self._parts.same()
            and self._product.serves(x.dtype)
        ):
            return self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return type(self._module).forward(self._module, x)


class _Block:
    """``forward`` of a decoder layer like Llama's."""

    def __init__(self, module: Any) -> None:
        self._module, self._parts = module, _Parts(module)
        attention, mlp = module.self_attn, module.mlp
        before, after = module.input_layernorm, module.post_attention_layernorm
        heads = attention.q_proj, attention.k_proj, attention.v_proj
        rest = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self._project = Projection(
            [matrix_of(each) for each in heads], Norm(before.weight, before.variance_epsilon)
        )
        self._finish = SecondHalf(
            tuple(matrix_of(each) for each in rest),  # type: ignore[arg-type]
            Norm(after.weight, after.variance_epsilon),
        )
        self.weight = before.weight
        self._sizes = [each.out_features // attention.head_dim for each in heads]
        self._window = window_of(attention)
        self._cache_name = cache_name(module)

    def block(self) -> Block:
        """What the core is told about it."""
        attention = self._module.self_attn
        q_heads, kv_heads, _ = self._sizes
        dim, scale = attention.head_dim, attention.scaling
        return Block(self._project, self._finish, q_heads, kv_heads, dim, scale, self._window)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The block's output, [rows, new, width]."""
        cache = take_cache(kwargs)
        pages = self._pages(hidden_states, cache, attention_mask, kwargs)
        if pages is None or position_embeddings is None:
            if cache is not None:
                kwargs[self._cache_name] = cache
            return type(self._module).forward(
                self._module,
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        attention, sizes = self._module.self_attn, self._sizes
        rows, new, width = hidden_states.shape
        x = hidden_states.reshape(-1, width)
        rotary = _rotary(position_embeddings, rows, sizes[0] + sizes[1])
        mixed = self._project(x, rotary).view(rows * new, -1, attention.head_dim)
        q, k, v = mixed.split_with_sizes(sizes, 1)
        facts = functions.facts_of(attention_mask, self._window)
        params = functions.params_of(attention.scaling, facts.window)
        out = pages.attend_packed(q, k, v, new, params, facts.padding)
        return self._finish(out.view(rows * new, -1), x).view(rows, new, width)

    def _pages(
        self, x: Tensor, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> PagedLayer | None:
        """The layer of the cache; None where the model's own code has to run."""
        module = self._module
        if (
            type(cache) is not QuantPageCache
            or not _served_here(x, self.weight, most_tokens(x.dtype))
            or (mask is not None and mask.ndim != 2)
            or not kwargs.keys() <= _HARMLESS
            or module.training
            or not self._parts.same()
            or self._parts.watched()
        ):
            return None
        layer = cache.layers[module.self_attn.layer_idx]
        ready = type(layer) is PagedLayer and layer.is_initialized and layer.dtype == x.dtype
        served = self._project.serves(x.dtype) and self._finish.serves(x.dtype)
        return layer if ready and served else None


_OURS = frozenset({type(None), _Linear, _Block})
"""What an inner module has in the place of its class's forward; somebody else's is called."""
_HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    # Of generate(stop_strings=...), which some versions hand on to every forward.
    "tokenizer",
}
"""Arguments that a model may hand to its blocks and that do not change their result."""
_SHOWN = ("output_attentions", "output_hidden_states")
"""What the model's own code collects while its blocks run one by one."""


def _rotary(embeddings: tuple[Tensor, Tensor], rows: int, heads: int) -> Rotary:
    """cos and sin, which may be the same for all rows, a line a token."""
    cos, sin = embeddings
    if cos.shape[0] != rows:
        cos, sin = (each.expand(rows, -1, -1) for each in embeddings)
    return Rotary(cos.flatten(0, 1).contiguous(), sin.flatten(0, 1).contiguous(), heads)


class _Model:
    """``forward`` of a decoder whose blocks run in one call."""

    def __init__(self, module: Any, blocks: list[_Block]) -> None:
        self._module, self._parts, self._blocks = module, _Parts(module), blocks
        norm = module.norm
        self._normed = is_llama_norm(norm)
        last = Norm(norm.weight, norm.variance_epsilon) if self._normed else None
        self._decoder = Decoder([each.block() for each in blocks], last)
        _, _, self._q_heads, self._kv_heads, self._head_dim, *_ = blocks[0].block()
        self._names = parameters(module)
        self._still = is_still_rotary(module.rotary_emb)
        self._asked = self._parts.asked()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own forward returns."""
        out = self._step({**dict(zip(self._names, args, strict=False)), **kwargs})
        return type(self._module).forward(self._module, *args, **kwargs) if out is None else out

    def _step(self, given: dict[str, Any]) -> BaseModelOutputWithPast | None:
        """None where the model's own code has to run."""
        cache, mask = take_cache(given), given.pop("attention_mask", None)
        tokens, x = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        positions = given.pop("position_ids", None)
        known = tokens if x is None else x[..., 0]
        if (
            type(cache) is not QuantPageCache
            or known is None
            or (tokens is not None and x is not None)
            or known.ndim != 2
            or not known.numel()
            or not (mask is None or (type(mask) is Tensor and mask.ndim == 2))
            or not self._asks_nothing_else(given)
            or not self._unchanged()
        ):
            return None
        x = self._module.embed_tokens(tokens) if x is None else x
        weight = self._blocks[0].weight
        most = most_tokens(x.dtype)
        if not _served_here(x, weight, most) or not self._decoder.serves(x.dtype):
            return None
        rows, new, width = x.shape
        past = cache.get_seq_length()
        if positions is None:
            begin = given.get("cache_position")
            begin = torch.arange(past, past + new, device="cpu") if begin is None else begin
            positions = begin[None]
        cos, sin = (each.expand(rows, -1, -1).flatten(0, 1) for each in self._turn(x, positions))
        with cache.rows.still():
            padding = functions.padding_of(mask, past + new)
            cache.lay_out(x.new_empty(rows, self._kv_heads, 0, self._head_dim))
            begun = cache.begin_step(rows, new, padding, self._q_heads, x.dtype)
            if begun is None:
                return None
            x = self._decoder(x.reshape(-1, width), cos, sin, *begun).view(rows, new, width)
        x = x if self._normed else self._module.norm(x)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache)  # type: ignore[arg-type]

    def _asks_nothing_else(self, given: dict[str, Any]) -> bool:
        """Whether the rest of the arguments, and the configuration's defaults, want no more."""
        config = self._module.config
        return (
            given.keys() <= _HARMLESS
            and getattr(config, "is_causal", None) is not False
            and not any(given.get(each, getattr(config, each, False)) for each in _SHOWN)
            and given.get("return_dict", getattr(config, "return_dict", True)) is not False
        )

    def _unchanged(self) -> bool:
        """Whether nobody looks into the decoder or has changed it."""
        self._asked.fetch()
        module = self._module
        layers = module.layers
        return (
            not module.training
            and len(layers) == len(self._blocks) == module.config.num_hidden_layers
            and self._parts.same()
            and not self._parts.watched()
            and all(
                vars(layer).get("forward") is block
                for layer, block in zip(layers, self._blocks, strict=True)
            )
        )

    def _turn(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [rows or 1, new, head_dim], in x's dtype."""
        rotary = self._module.rotary_emb
        if not self._still:
            return rotary(x, position_ids=positions)
        # What the module computes, in a fifth of its time: no check of its kind, no autocast.
        half = positions[..., None].float() * rotary.inv_freq.float()
        angles, scaling = torch.cat((half, half), -1), rotary.attention_scaling
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)
