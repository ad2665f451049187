"""Multi-head latent attention over the latent rows themselves (DeepSeek-V2, arXiv 2405.04434).

Transformers' models of this kind cache one latent row and one rotary key a token, for all heads,
and make the keys and values of every head of them before they attend: ``expand_kv``, word for word
the same in all of them, where W of ``kv_b_proj`` is cut into W_k and W_v of each head:

    key = [W_k row, rotary key]      value = W_v row

An attached model's ``expand_kv`` hands back stand-ins, and attention multiplies the other way
round, so that pages are read as they are and no head has keys of its own:

    score = [W_k^T q, q_rope] . [row, rotary key]      out = W_v (weighted sum of rows)

That is the same number of additions in another order. It costs a prompt more products a pair of
tokens (the row is wider than a head) and a decode step far fewer: nothing is expanded.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from quantpage.integrations.hf_transformers.modules.llama_like import code_of, is_linear
from quantpage.integrations.hf_transformers.pages.lazy import AttendedPages, LazyKV, layer_behind
from quantpage.ops.attend import AttendParams

_EXPANDS = "it expands latent rows (MLA) in a way of its own"
_NOT_PLAIN = (
    "its kv_b_proj, through which latent rows (MLA) are attended to, is no plain linear layer"
)


def has_latent_rows(module: nn.Module) -> bool:
    """Whether an attention caches latent rows and expands them."""
    return hasattr(type(module), "expand_kv")


def caches_latent_rows() -> bool:
    """Whether this Transformers caches latent rows; 5.12 caches keys and values of every head."""
    return _known_expansion() is not None


def why_expanded(module: Any) -> str | None:
    """Why the latent rows of an attention have to be expanded; None: they are attended to."""
    known = _known_expansion()
    if known is None or code_of(type(module).expand_kv) != known or _replaced(module, "expand_kv"):
        return _EXPANDS
    weights = module.kv_b_proj
    return _why_not_absorbed(module) or (_NOT_PLAIN if _replaced(weights, "forward") else None)


def attend_to_rows(module: Any, undo: list[Callable[[], None]]) -> None:
    """Give an attention stand-ins for keys and values in place of expanded ones.

    undo: is given what takes that back.
    """
    undo.append(lambda: vars(module).pop("expand_kv", None))
    module.expand_kv = partial(_expand, module)


@lru_cache
def _known_expansion() -> tuple[Any, ...] | None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    found = getattr(deepseek.DeepseekV3Attention, "expand_kv", None)
    return None if found is None else code_of(found)


def _replaced(module: nn.Module, name: str) -> bool:
    return name in vars(module)


def _why_not_absorbed(module: Any) -> str | None:
    """Of the weights as they are now: adapters come and go while a model is attached."""
    weights = module.kv_b_proj
    rows, rank = module.qk_nope_head_dim + module.v_head_dim, module.kv_lora_rank
    if (
        not is_linear(weights)
        or weights.bias is not None
        or weights._forward_hooks
        or weights._forward_pre_hooks
        or weights.weight.shape[0] % rows
        or weights.weight.shape[1] != rank
    ):
        return _NOT_PLAIN
    return None


def _expand(module: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """``expand_kv``: stand-ins where a layer's pages are behind the rows, else keys and values."""
    own = partial(type(module).expand_kv, module)
    rows = layer_behind(latent, rotary)
    if rows is None:
        return own(latent, rotary)
    why = _why_not_absorbed(module)
    if why is not None:
        rows.serve_densely(why)
        return own(latent, rotary)
    pages = _Expanded(rows, module, own)
    if not isinstance(latent, LazyKV):
        # Part of a graph, whose gradient is that of what is expanded.
        made = own(latent, rotary)
        for each in made:
            each.layer = pages  # type: ignore[attr-defined]
        return made
    heads = module.kv_b_proj.weight.shape[0] // (module.qk_nope_head_dim + module.v_head_dim)

    def stand_in(which: str, width: int) -> LazyKV:
        shape = latent.shape[0], heads, 0, width
        like = torch.empty(shape, dtype=latent.dtype, device=latent.device)
        return LazyKV(pages, which, like, pages.length)

    key_dim = module.qk_nope_head_dim + module.qk_rope_head_dim
    return stand_in("key", key_dim), stand_in("value", module.v_head_dim)


class _Expanded:
    """What the stand-ins stand for: keys and values of all heads, of the rows of one layer."""

    def __init__(
        self, rows: AttendedPages, module: Any, expand: Callable[[Tensor, Tensor], Any]
    ) -> None:
        self._rows, self._module, self._expand = rows, module, expand
        self._dense: tuple[Tensor, Tensor] | None = None
        self.index = rows.index

    @property
    def length(self) -> int:
        """Tokens a row of the batch, padding included."""
        return self._rows.length

    def serve_densely(self, why: str) -> None:
        """Say that attention reads dense tensors instead of these pages."""
        self._rows.serve_densely(why)

    def refuse_gradients(self) -> None:
        """ValueError where attention follows a mask that the model's own does not know."""
        self._rows.refuse_gradients()

    def dequantized(self, which: str) -> Tensor:
        """[rows, heads, length, ..] of keys ('key') or values ('value'), expanded."""
        if self._dense is None:
            halves = [self._rows.dequantized(each) for each in ("key", "value")]
            self._dense = self._expand(*halves)
        return self._dense[which == "value"]

    def attend(self, query: Tensor, params: AttendParams, padding: Tensor | None) -> Tensor:
        """[rows, heads, new, key_dim] queries -> [rows, new, heads, v_head_dim]."""
        module = self._module
        nope, rope = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
        for_keys, for_values = _halves(module, query.dtype)
        absorbed = torch.cat([nope @ for_keys, rope], -1)
        sums = self._rows.attend(absorbed, params, padding)
        return (sums.transpose(1, 2) @ for_values.mT).transpose(1, 2)


def _halves(module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W_k, [heads, nope, rank], and W_v, [heads, v_head_dim, rank]."""
    layer = module.kv_b_proj
    weight = layer.weight.to(dtype)
    if getattr(layer, "scale", None) is not None:
        weight = weight * layer.scale.to(dtype)[:, None]
    widths = [module.qk_nope_head_dim, module.v_head_dim]
    key, value = weight.view(-1, sum(widths), weight.shape[1]).split(widths, 1)
    return key, value
