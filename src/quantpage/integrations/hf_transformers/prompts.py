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

from quantpage.cache import PrefixCache
from quantpage.cache.saved import read_pages
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
        self._known = {
            reach: PrefixCache(
                shelf.pool, self._memory.page_size, b"", shelf.exact_pool, shelf.reach
            )
            for reach, shelf in self._memory.shelves.items()
        }

    def __len__(self) -> int:
        """Pages of tokens that are remembered."""
        return max(map(len, self._known.values()), default=0)

    def new_cache(self, ids: Int[Tensor, "1 tokens"]) -> QuantPageCache:
        """A cache that holds the longest known beginning of ``ids``, short of the last token.

        Give it to ``generate`` together with all of ``ids``.
        """
        self._evict()
        made = self._attached.new_cache(self._memory)
        tokens = _tokens(ids)[:-1]
        # A hit ends where the pages that the next query sees are known in every table.
        ends = [each.hits(tokens) for each in self._known.values()]
        pages = max(set.intersection(*ends), default=0) if ends else 0
        if pages:
            tokens = tokens[: pages * self._memory.page_size]
            made.rows.adopt({reach: each.acquire(tokens) for reach, each in self._known.items()})
            made.set_length(len(tokens))
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
        tokens = _tokens(ids)
        added = [
            each.insert(tokens, cache.rows.tables[reach][0]) for reach, each in self._known.items()
        ]
        return max(added, default=0)

    def _evict(self) -> None:
        if self._max_pages is not None:
            for each in self._known.values():
                each.evict(max(0, len(each) - self._max_pages))


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
    saved = read_pages(path)
    if saved.note.get("model") != model_digest(attached.model):
        raise CorruptCache(f"{path}: expected pages of this model, got those of another")
    if "tables" not in saved.note:
        raise CorruptCache(f"{path}: expected the page tables of a cache, got pages without them")
    empty = attached.new_cache()
    for index, layout in saved.layouts.items():
        form, page_size = empty.formats[index], empty.options.page_size
        if (form, page_size) != (layout.format, layout.page_size):
            raise CorruptCache(
                f"{path}, layer {index}: expected {form.name} in pages of {page_size} tokens, "
                f"got {layout.format.name} in pages of {layout.page_size}"
            )
    made = empty.over(Rows.of_saved(empty.rows.memory, saved, device))
    made.set_length(saved.note["length"])
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
