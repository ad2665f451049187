"""Prompts that were computed before: remembered in memory, or saved to a file.

A cache that holds the beginning of a prompt is all that ``generate`` needs: it computes the rest.
``Prompts`` finds that beginning by its tokens, in pages that its caches share; a file brings it
to another process.
"""

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from quantpage.cache import PagedKVCache, PrefixCache
from quantpage.errors import CorruptCache, UnsupportedModel
from quantpage.integrations.hf_transformers.cache import PagedLayer, QuantPageCache
from quantpage.integrations.hf_transformers.rows import Rows

if TYPE_CHECKING:
    from quantpage.integrations.hf_transformers.attach import Attached


class Prompts:
    """Beginnings of prompts, kept in one memory for all caches that it makes.

    The weights of the model must stay as they are.
    """

    def __init__(self, attached: "Attached", max_pages: int | None = None) -> None:
        """max_pages: remembered at most, least recently used out first, as soon as no cache reads
        them; None: no limit."""
        self._attached, self._max_pages = attached, max_pages
        first = attached.new_cache()
        _refuse_other_state(first)
        self._memory = first.rows.memory
        # Model, formats and page size are the same for every cache here.
        self._known = PrefixCache(
            self._memory.pool, self._memory.page_size, b"", self._memory.exact_pool
        )

    def __len__(self) -> int:
        """Pages that are remembered."""
        return len(self._known)

    def new_cache(self, ids: Int[Tensor, "1 tokens"]) -> QuantPageCache:
        """A cache that holds the longest known beginning of ``ids``, short of the last token.

        Give it to ``generate`` together with all of ``ids``.
        """
        self._evict()
        made = self._attached.new_cache(self._memory)
        known = self._known.acquire(_tokens(ids)[:-1])
        if known.pages:
            made.rows.adopt(known)
            made.set_length(len(known.pages) * self._memory.page_size)
        return made

    def learn(self, ids: Int[Tensor, "1 tokens"]) -> int:
        """Compute ``ids``, a system prompt, as far as it is not known, and remember it.

        Returns the pages added. With exact pages a later prompt can use what was learnt up to
        the end of ``ids``, or of any other text that was learnt, but not up to a place between.
        """
        cache = self.new_cache(ids)
        with torch.inference_mode():
            # Without the head: no logits are asked for.
            body: Any = self._attached.model.base_model
            body(input_ids=ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True)
        added = self.remember(ids, cache)
        del cache
        self._evict()
        return added

    def remember(self, ids: Int[Tensor, "1 tokens"], cache: QuantPageCache) -> int:
        """Remember the full pages of ``cache``, which holds ``ids`` (what ``generate`` returned,
        say); pages added."""
        if cache.rows.memory is not self._memory:
            raise ValueError("cache: expected one that new_cache() of these prompts made")
        cache.flush()
        return self._known.insert(_tokens(ids), cache.rows.sequences[0])

    def _evict(self) -> None:
        if self._max_pages is not None:
            self._known.evict(max(0, len(self._known) - self._max_pages))


def save_cache(attached: "Attached", cache: QuantPageCache, path: Path | str) -> None:
    """Write what ``cache`` holds to a file, whole or not at all."""
    _refuse_other_state(cache)
    if not cache.get_seq_length():
        raise ValueError("cache: expected one that holds tokens, got an empty one")
    cache.flush()
    cache.rows.save(path, {"model": model_digest(attached.model)})


def load_cache(attached: "Attached", path: Path | str) -> QuantPageCache:
    """The cache that ``save_cache`` wrote, for the same model and formats.

    Raises CorruptCache where model, formats or page size differ, or the file is damaged.
    """
    device = next(attached.model.parameters()).device
    store, note = PagedKVCache.load(path, device)
    if note.get("model") != model_digest(attached.model):
        raise CorruptCache(f"{path}: expected pages of this model, got those of another")
    empty = attached.new_cache()
    for index, layout in store.layouts.items():
        form, page_size = empty.formats[index], empty.options.page_size
        if (form, page_size) != (layout.format, layout.page_size):
            raise CorruptCache(
                f"{path}, layer {index}: expected {form.name} in pages of {page_size} tokens, "
                f"got {layout.format.name} in pages of {layout.page_size}"
            )
    empty.rows.memory.fill(store)
    made = empty.over(Rows.of_saved(empty.rows.memory, note))
    made.set_length(note["length"])
    return made


def model_digest(model: nn.Module) -> str:
    """Tells models apart: name, shape and a few numbers of every parameter."""
    made = blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        few = flat[:: max(1, flat.numel() // 8)].float().tolist()
        made.update(f"{name} {tuple(weight.shape)} {weight.dtype} {few}\n".encode())
    return made.hexdigest()


def _tokens(ids: Tensor) -> list[int]:
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"ids: expected one row of tokens, got {tuple(ids.shape)}")
    return ids[0].tolist()


def _refuse_other_state(cache: QuantPageCache) -> None:
    for index, layer in enumerate(cache.layers):
        other: Any = layer
        if not isinstance(other, PagedLayer):
            raise UnsupportedModel(
                f"layer {index}: expected keys and values in pages, got {type(other).__name__}, "
                "whose state is not kept for later"
            )
