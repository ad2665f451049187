"""A layer's attention bound to its pages: one call of an engine's module, compiled or not.

``torch.compile`` cannot look into plans and views, and a step's integers would have it compile
again at every step. So a compiled module sees one operator, ``quantpage::attention_step``, with
tensors and a number; which pages and which step they mean is looked up when it runs. Outside of
compiled code the operator is left out, as the dispatcher would cost more than the look-ups.

The operator says that it changes ``out``. That it changes pages it does not say: a graph that knew
would have to keep a copy of a cache of gigabytes. Its order among others follows from ``out``.
"""

from collections.abc import Callable
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from quantpage.attention import LayerAttention
from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.ops.attend import AttendParams
from quantpage.ops.rope_write import WriteParams
from quantpage.ops.rows import Keys, Outputs, Queries, Values


class CurrentStep:
    """The step that a model's layers serve; an engine sets ``batch`` before each forward."""

    __slots__ = ("batch",)

    def __init__(self, batch: BatchPlan | None = None) -> None:
        self.batch = batch


_numbers = count()
_bound: WeakValueDictionary[int, "BoundAttention"] = WeakValueDictionary()


class BoundAttention:
    """Write a step's keys and values of one layer, then attend to its pages."""

    def __init__(
        self,
        attention: LayerAttention,
        pages: Callable[[], LayerKV],
        write: WriteParams,
        attend: AttendParams,
        step: CurrentStep,
    ) -> None:
        """pages: the layer's view as it is now, ``lambda: cache.layer(0)``, as a cache may grow.

        step: shared by the layers of a model.
        """
        self.attention, self.pages, self.write, self.attend = attention, pages, write, attend
        self.step = step
        self.out_dim = attention.call.out_dim
        self.number = next(_numbers)
        _bound[self.number] = self

    def __call__(self, q: Queries, k: Keys, v: Values, out: Outputs | None = None) -> Outputs:
        """``out``, or new memory, with the output in the model's basis.

        Raises ValueError for what does not fit the step, before anything is written, and
        RuntimeError where no step is set.
        """
        if out is None:
            out = q.new_empty(q.shape[0], q.shape[1], self.out_dim)
        if torch.compiler.is_compiling():
            torch.ops.quantpage.attention_step(q, k, v, out, self.number)
        else:
            self.run(q, k, v, out)
        return out

    def run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """What the operator does, on [tokens, heads, width]; RuntimeError where no step is set."""
        batch = self.step.batch
        if batch is None:
            raise RuntimeError("step: expected a batch to be set before the forward, got none")
        self.attention.into(out, (q, k, v), self.pages(), batch, self.write, self.attend)


def _attention_step(q: Tensor, k: Tensor, v: Tensor, out: Tensor, number: int) -> None:
    found = _bound.get(number)
    if found is None:
        raise RuntimeError(
            f"attention_step: expected a layer that is alive, got number {number}, whose "
            "BoundAttention is gone; keep it as long as what was compiled with it"
        )
    found.run(q, k, v, out)


# Not torch.library.custom_op, whose wrapper costs a call several times as much.
_library = torch.library.Library("quantpage", "FRAGMENT")
_library.define(
    "attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) out, int number) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
for _key in ("CPU", "CUDA"):
    _library.impl("attention_step", _attention_step, _key)
torch.library.register_fake(
    "quantpage::attention_step", lambda q, k, v, out, number: None, lib=_library
)
