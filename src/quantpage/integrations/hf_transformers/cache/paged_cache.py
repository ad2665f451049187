"""A Transformers cache in quantized pages: one page table a row for layers that see alike."""

import operator
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from quantpage.batch import BatchPlan
from quantpage.cache import LayerKV, Reach
from quantpage.cache.counts import whole
from quantpage.errors import CacheError, UnsupportedModel
from quantpage.integrations.hf_transformers.cache.encoder_layer import EncoderLayer
from quantpage.integrations.hf_transformers.cache.paged_layer import CacheOptions, PagedLayer
from quantpage.integrations.hf_transformers.cache.turns import Turns
from quantpage.integrations.hf_transformers.loading.model import (
    lent_layers,
    reaches_of,
    stock_layers,
)
from quantpage.integrations.hf_transformers.pages.memory import Memory
from quantpage.integrations.hf_transformers.pages.rows import Rows

T = TypeVar("T")

_STOCK = (DynamicLayer, DynamicSlidingWindowLayer)


class QuantPageCache(Cache):
    """What ``generate`` and ``forward`` get as ``past_key_values`` while a model is attached."""

    def __init__(self, config: object, options: CacheOptions, memory: Memory | None = None) -> None:
        # What Transformers would build; layers with another state than keys and values (linear
        # attention, convolutions) stay as they are.
        stock = stock_layers(config)
        self.options = options
        self.formats = options.formats.of_layers(len(stock))
        reaches = reaches_of(config, stock)
        if memory is None:
            kinds: dict[Reach, bool] = {}
            for index, each in enumerate(stock):
                if not isinstance(each, CacheLayerMixin) or index in options.own_state:
                    continue
                exact = self.formats[index].exact_pages is not None
                kinds[reaches[index]] = exact or kinds.get(reaches[index], False)
            memory = Memory(options.page_size, kinds, options.max_tokens)
        self.rows = Rows(memory)
        self.rows.lent = lent_layers(config)
        self._in_core: list[PagedLayer] | None = None
        """All layers, once it is known that the compiled core serves them."""
        self.turns = Turns()
        super().__init__(
            layers=[
                self._layer(index, each, reach)
                for index, (each, reach) in enumerate(zip(stock, reaches, strict=True))
            ]
        )

    def _layer(self, index: int, stock: Any, reach: Reach) -> Any:
        """Pages in place of what Transformers would keep; a recurrent state stays as it is."""
        # Below, as its classes are built on PagedLayer.
        from quantpage.integrations.hf_transformers.cache.hybrid import HYBRID, PagedHybridLayer

        made = (index, reach, self.formats[index], self.options, self.rows)
        if type(stock) in HYBRID:
            return PagedHybridLayer(stock, *made)
        if type(stock) in _STOCK and index not in self.options.own_state:
            return PagedLayer(*made)
        if index in self.options.own_state and type(stock) is DynamicLayer:
            return EncoderLayer()
        if isinstance(stock, CacheLayerMixin) and index not in self.options.own_state:
            raise UnsupportedModel(
                f"layer {index}: expected keys and values that every query may read, got "
                f"{type(stock).__name__}, where something else chooses or merges keys"
            )
        return stock

    def forward(self, act: Callable[[], T]) -> T:
        """``act()``, a forward that brings tokens; should it not return, they were never there."""

        def run() -> T:
            encoded = [each for each in self.layers if isinstance(each, EncoderLayer)]
            start, held = self.rows.length, [each.get_seq_length() for each in encoded]
            made = act()
            for each, before in zip(encoded, held, strict=True):
                each.note(start, before)
            self.turns.spent = False
            return made

        # A model's body inside of the model is part of the same forward.
        return act() if self.turns.mine else self.turns.take(run, self._begin, self._put_back)

    def _begin(self) -> list[tuple[PagedLayer, tuple[int, bool]]] | None:
        if self.rows.frozen is not None:
            return None
        self._flush()
        # True while state that cannot be put back changes.
        self.turns.spent = bool(self.stateful())
        return [(layer, layer.mark()) for layer in self.paged()]

    def _put_back(self, before: list[tuple[PagedLayer, tuple[int, bool]]]) -> None:
        self.rows.cancel()
        self.rows.attention_mask = None
        for layer, mark in before:
            layer.put_back(mark)

    def lay_out(self, like: Tensor) -> None:
        """Make room for layers that have none yet; like: [rows, kv_heads, any, head_dim] keys."""
        for layer in self.paged():
            if not layer.is_initialized:
                layer.lazy_initialization(like, like)

    def begin_step(
        self, rows: int, new: int, padding: Tensor | None, q_heads: int, dtype: torch.dtype
    ) -> tuple[list[LayerKV], list[BatchPlan]] | None:
        """Count ``new`` tokens of every row, for a caller who lets the core write them in
        ``rows.still()``.

        Returns the pages and the step's plan of every layer; None where that is not possible.
        """
        if self._in_core is None:
            layers = [each for each in self.paged() if each.in_core(q_heads, dtype)]
            if len(layers) != len(self.layers):
                return None
            self._in_core = layers
        layers = self._in_core
        self.rows.begin(rows)
        for layer in layers:
            layer.flush()
        step = self.rows.step(layers[0].length, new, padding)
        if step.keep is not None and step.keep.numel() != rows * new:
            return None
        if any(part.working is not None for part in step.parts.values()):
            return None
        for layer in layers:
            layer.length += new
        return (
            [self.rows.layer(layer.index) for layer in layers],
            [step.parts[layer.reach].batch for layer in layers],
        )

    def fork(self) -> "QuantPageCache":
        """Another cache with the same tokens; pages are shared until one of the two writes.

        ``copy.deepcopy``, which Transformers' documentation uses for this, does the same. Raises
        CacheError where a state is in the model's modules.
        """
        return self.turns.take(self._fork)

    def _fork(self) -> "QuantPageCache":
        for index, layer in self.stateful().items():
            if not _has_state(layer):
                raise CacheError(
                    f"layer {index}: expected a state in the cache, which can be forked, and its "
                    "modules keep it"
                )
        self._flush()
        return self.over(self.rows.fork())

    def over(self, rows: Rows) -> "QuantPageCache":
        """The same cache over other rows, in any memory."""
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        made.rows, made._in_core = rows, None
        made.turns = Turns()
        made.layers = [
            each.fork(rows) if isinstance(each, PagedLayer) else deepcopy(each)
            for each in self.layers
        ]
        return made

    def flush(self) -> None:
        """Write keys and values that wait, and count them: the pages hold every token."""
        self.turns.take(self._flush)

    def _flush(self) -> None:
        for layer in self.paged():
            layer.flush()
        self.rows.settle()

    def __deepcopy__(self, memo: dict[int, object]) -> "QuantPageCache":
        """``fork``."""
        return self.fork()

    def __reduce_ex__(self, _: Any) -> Any:
        """No copy by its parts: they are pages, which others may hold."""
        raise ValueError(
            "cache: expected save_cache() or fork() where it is written or copied, got pickle or "
            "copy.copy"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes a copy of row ``beam_idx[i]``; pages are shared."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times; pages are shared."""
        repeats = whole("repeats", repeats, 1)
        self._select([row for row in range(self.rows.count) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._select(torch.arange(self.rows.count, device="cpu")[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: -n drops n, a positive number is a length to keep.

        Raises ValueError for what is no whole number, CacheError where a page or a state of before
        is gone.
        """
        try:
            # Transformers counts with tensors, which would change under the lengths that are kept.
            tokens = operator.index(tokens_to_remove)
        except TypeError:
            raise ValueError(
                f"tokens_to_remove: expected a whole number, got {tokens_to_remove!r}"
            ) from None
        self.turns.take(partial(self._crop, tokens))

    def _crop(self, tokens_to_remove: int) -> None:
        lengths = {layer.length for layer in self.paged()}
        length = max(lengths, default=0)
        drop = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        for index, layer in self.stateful().items():
            if drop and not (_has_state(layer) and _goes_back(layer)):
                raise CacheError(
                    f"layer {index}: expected a state that remembers its past, to drop {drop} "
                    f"tokens, got {type(layer).__name__}, which holds the newest alone"
                )
        for layer in self.paged():
            layer.flush()

        def paged() -> None:
            self.rows.crop(length - drop)
            for layer in self.paged():
                self.rows.memory.ledger.note(layer.put_back, layer.mark())
                layer.length = min(layer.length, length - drop)

        def stock(layer: Any) -> None:
            if isinstance(layer, EncoderLayer):
                layer.forget(length - drop)
            elif _goes_back(layer):
                # Those that do take no length to keep.
                layer.crop(-drop if drop else tokens_to_remove)

        self._change(paged, stock)

    def reset(self) -> None:
        """Forget everything; the next prompt may have another number of rows."""
        self.turns.spent = False
        self.turns.take(self._reset)

    def _reset(self) -> None:
        def paged() -> None:
            for layer in self.paged():
                self.rows.memory.ledger.note(layer.put_back, layer.mark())
                layer.put_back((0, False))
            self.rows.clear()

        self._change(paged, lambda stock: stock.reset())

    def set_length(self, length: int) -> None:
        """What Transformers is told to be cached (graphs count on the device; kept prompts)."""
        for layer in self.paged():
            layer.length = int(length)

    def lengths(self) -> set[int]:
        """Tokens a row in each layer that keeps any, padding included; more than one value in the
        middle of a step."""
        return {layer.length for layer in self.paged() if layer.is_initialized} or {0}

    def used_bytes(self) -> int:
        """Bytes of the pages that hold this cache's tokens, scales, zeros and exact pages counted.

        A page that beams or other caches share counts once.
        """
        return self.rows.used_bytes()

    def allocated_bytes(self) -> int:
        """Bytes that stand in memory: held and free pages, those of other caches in the same
        memory (forks, ``prompts()``) too."""
        return self.rows.memory.allocated_bytes()

    def peak_bytes(self) -> int:
        """The most that was allocated at once: while pools grew and prompts were computed."""
        return self.rows.memory.peak_bytes

    def trim(self) -> int:
        """Give back free pages after the last that is held; bytes given back."""
        return self.rows.memory.trim()

    def unquantized_bytes(self) -> int:
        """What Transformers' own cache would hold for the same tokens, in the model's dtype."""
        return self.rows.unquantized_bytes()

    def _select(self, rows: list[int]) -> None:
        """Row i becomes what row ``rows[i]`` was; ValueError, with nothing changed, for no row."""
        there = self.rows.count
        wrong = next((row for row in rows if not 0 <= row < there), None) if there else None
        if wrong is not None:
            raise ValueError(f"rows: expected some of 0 to {there - 1}, got {wrong}")
        chosen = torch.tensor(rows, dtype=torch.long, device="cpu")

        def select() -> None:
            self._flush()
            # Of any number of rows, also where a layer of Transformers knows no other selection.
            self._change(partial(self.rows.select, rows), lambda stock: stock.reorder_cache(chosen))

        self.turns.take(select)

    def _change(self, paged: Callable[[], None], stock: Callable[[Any], object]) -> None:
        """What is done to the pages, whole, and to each state beside them."""
        beside = [each for each in self.layers if _has_state(each)]
        try:
            self.turns.spent = bool(beside)
            self.rows.memory.ledger.whole(paged)
        except (CacheError, ValueError):
            # Refused, with nothing changed.
            self.turns.spent = False
            raise
        for each in beside:
            stock(each)
        self.turns.spent = False

    def paged(self) -> list[PagedLayer]:
        """The layers whose keys and values are in pages."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def stateful(self) -> dict[int, Any]:
        """Layers with another state than pages, or beside them, by their index; also those whose
        modules keep it, where no cache has it (Recurrent Gemma): a forward tells them."""
        ledger = self.options.ledger
        elsewhere = ledger.own_state - ledger.paged if self.rows.memory.layouts else ()
        return {
            index: layer
            for index, layer in enumerate(self.layers)
            if index in elsewhere or _has_state(layer)
        }


def _has_state(layer: Any) -> bool:
    """Whether a layer of the cache keeps more than pages."""
    return not isinstance(layer, PagedLayer) or isinstance(layer, LinearAttentionLayer)


def _goes_back(layer: Any) -> bool:
    """Whether Transformers lets a state forget its newest tokens: one of linear attention does only
    in generation with drafts, which asks it to record."""
    return not isinstance(layer, LinearAttentionLayer) or getattr(layer, "record_past", True)
