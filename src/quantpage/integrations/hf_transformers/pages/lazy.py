"""A tensor with a shape and no data, which stands for what a layer's pages hold.

A Transformers model calls ``cache.update(k, v)`` and hands the two results to its attention
function. Ours returns ``LazyKV``: the attention function recognizes it and reads the pages behind
it; any other operation (models that do not use the attention interface, or work on what is cached
first) dequantizes it on first touch, so that such a model stays correct and
merely loses the speed.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from quantpage.ops.attend import AttendParams


class Pages(Protocol):
    """The layer whose pages a lazy tensor stands for."""

    @property
    def index(self) -> int:
        """Of the layer."""

    @property
    def length(self) -> int:
        """Tokens a row, padding included."""

    def serve_densely(self, why: str) -> None:
        """Say that attention reads dense tensors instead of these pages."""

    def dequantized(self, which: str) -> Tensor:
        """[rows, kv_heads, length, head_dim] of keys ('key') or values ('value')."""


class AttendedPages(Pages, Protocol):
    """Pages that attention reads as they are."""

    def attend(self, query: Tensor, params: AttendParams, padding: Tensor | None) -> Tensor:
        """[rows, q_heads, new, head_dim] queries -> [rows, new, q_heads, value_head_dim]."""

    def refuse_gradients(self) -> None:
        """ValueError where attention follows a mask that the model's own does not know."""


class LazyKV(torch.Tensor):
    """[rows, kv_heads, tokens, head_dim] of keys ('key') or values ('value') of one layer."""

    layer: Pages
    which: str
    length: int

    @staticmethod
    def __new__(cls, layer: Pages, which: str, like: Tensor, length: int) -> "LazyKV":
        """A stand-in shaped as ``like`` but ``length`` tokens long."""
        rows, heads, _, width = like.shape
        made = torch.Tensor._make_wrapper_subclass(
            cls, (rows, heads, length, width), dtype=like.dtype, device=like.device
        )
        made.layer, made.which, made.length = layer, which, length
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Any operation that is not ours sees the dequantized tensor."""

        if func.overloadpacket in _CONVERSIONS and _changes_nothing(func, args, kwargs or {}):
            return args[0]

        def plain(x: Any) -> Any:
            if not isinstance(x, LazyKV):
                return x
            x.layer.serve_densely("its own code works on keys and values after they are cached")
            return x.dequantized()

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def dequantized(self) -> Tensor:
        """What the pages hold, dense, in the model's basis and dtype."""
        if self.length != self.layer.length:
            raise RuntimeError(
                f"layer {self.layer.index}: this {self.which} tensor stood for {self.length} "
                f"tokens and the cache now holds {self.layer.length}; use it before the next update"
            )
        return self.layer.dequantized(self.which)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Shape and layer; never the data."""
        return f"LazyKV({self.which} of layer {self.layer.index}, {tuple(self.shape)})"


_CONVERSIONS = (torch.ops.aten.to, torch.ops.aten.type_as)


def _changes_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a conversion is to what the tensor is already.

    torch knows by itself and gives the tensor back, but not in inference mode, where it asks the
    class (Gemma 3n moves what it reads of other layers to where it is).
    """
    given, *rest = args
    empty = torch.empty(0, dtype=given.dtype, device=given.device)
    return not any(isinstance(x, LazyKV) for x in rest) and func(empty, *rest, **kwargs) is empty


def kept(given: Tensor) -> Tensor:
    """What stays as it is when the cache goes on: of a stand-in what the pages hold now, dense."""
    return given.dequantized() if isinstance(given, LazyKV) else given


def layer_behind(key: Tensor, value: Tensor) -> AttendedPages | None:
    """The pages that these keys and values stand for; None: other tensors."""
    layers = [getattr(each, "layer", None) for each in (key, value)]
    return layers[0] if layers[0] is layers[1] else None


class _EndOfGradients(torch.autograd.Function):
    """Tokens of an earlier forward, through which a gradient would have to go on."""

    @staticmethod
    def forward(ctx: Any, cached: Tensor, fresh: Tensor) -> Tensor:  # type: ignore[override]
        """``cached``; ``fresh`` makes it part of the graph."""
        return cached.view_as(cached)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refuse."""
        raise RuntimeError(
            "backward: expected all tokens of a gradient in one forward, got a cache that holds "
            "some; pages keep no graph (run earlier tokens under torch.no_grad() to take them as "
            "constants)"
        )


def with_gradient(dense: Tensor, fresh: Tensor, ended: bool) -> Tensor:
    """What pages hold, with the gradient of the newest tokens as they were before quantization.

    dense: [rows, kv_heads, tokens, head_dim]; fresh: its newest tokens, part of a graph. ended:
    the tokens before them were part of another graph.
    """
    start = dense.shape[2] - fresh.shape[2]
    cached, now = dense[:, :, :start], dense[:, :, start:]
    if ended and start:
        cached = _EndOfGradients.apply(cached, fresh)
    return torch.cat([cached, now + (fresh - fresh.detach())], 2)
