"""Prompts that were computed before: remembered in memory, or saved to a file.

A cache that holds the beginning of a prompt is all that ``generate`` needs: it computes the rest.
``Prompts`` finds that beginning by its tokens, in pages that its caches share; a file brings it
to another process.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from quantpage.cache import CacheLayout, KnownPages
from quantpage.cache.saved import check_layouts, read_pages
from quantpage.cache.tensor_file import Damaged
from quantpage.errors import CorruptCache, UnsupportedModel
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.cache.paged_layer import CacheOptions
from quantpage.integrations.hf_transformers.loading.model import text_config
from quantpage.integrations.hf_transformers.modules.coverage import refuse_look_ahead
from quantpage.integrations.hf_transformers.modules.digest import model_digest
from quantpage.integrations.hf_transformers.pages.memory import Memory
from quantpage.integrations.hf_transformers.pages.saved_rows import (
    save_rows,
    saved_rows,
    saved_tables,
)
from quantpage.masks import Mask


class Caching(Protocol):
    """An attached model, which makes caches."""

    model: nn.Module
    options: CacheOptions

    def new_cache(self, memory: Memory | None = None) -> QuantPageCache:
        """An empty cache, in a memory of its own where none is given."""


class Prompts:
    """Beginnings of prompts, kept in one memory for all caches that it makes.

    Weights that change make it forget. Adapters that are switched without changing weights, and
    pictures or sound, are no part of a prompt's tokens: ``salt`` names them.
    """

    def __init__(self, attached: Caching, max_pages: int | None = None) -> None:
        """max_pages: remembered at most, least recently used out first, as soon as no cache reads
        them; None: no limit."""
        self._attached, self._max_pages = attached, max_pages
        refuse_look_ahead(attached.model)
        if attached.options.mask is not None:
            _refuse_look_ahead(attached.options.mask)
        self._limit = _length_limit(attached.model.config)
        self._pictures = _placeholders(attached.model.config)
        self._weights = self._stamp()
        first = attached.new_cache()
        _refuse_other_state(first)
        self._memory = first.rows.memory
        # Model, formats and page size are the same for every cache here.
        self._known = KnownPages(self._memory.shelves, self._memory.page_size)

    def __len__(self) -> int:
        """Pages of tokens that are remembered."""
        return len(self._known)

    def new_cache(self, ids: Int[Tensor, "1 tokens"], salt: str = "") -> QuantPageCache:
        """A cache that holds the longest known beginning of ``ids``, short of the last token.

        Give it to ``generate`` together with all of ``ids``. salt: what keys and values depend on
        besides the tokens (an adapter's name, a checksum of the pictures); only what was
        remembered with the same is found, with all of the pictures or not at all.
        """
        made = self._attached.new_cache(self._memory)
        self._memory.ledger.whole(self._begin, made, _tokens(ids), salt)
        return made

    def _begin(self, made: QuantPageCache, ids: list[int], salt: str) -> None:
        self._evict()
        stamp = self._stamp()
        if stamp != self._weights:
            self._known.clear()
            self._weights = stamp
        tokens = self._usable(ids[:-1], salt)
        length, pages = self._known.acquire(
            tokens, salt.encode(), lambda at: not self._pictures_after(ids, at)
        )
        if length:
            made.rows.adopt(pages)
            made.set_length(length)

    def _usable(self, tokens: list[int], salt: str) -> list[int]:
        """As many of ``tokens`` as have keys and values that they alone decide."""
        if self._limit is not None and len(tokens) >= self._limit:
            return []
        pictures = self._pictures
        if salt or pictures is None:
            return tokens
        return tokens[: next((at for at, each in enumerate(tokens) if each in pictures), None)]

    def _pictures_after(self, ids: list[int], at: int) -> bool:
        """Whether a picture follows the first ``at`` tokens, or goes on there.

        Its tokens may see each other, and Transformers masks them otherwise where tokens are cached
        before them (Gemma 3: logits 2e-2 off with its own cache, too).
        """
        pictures = self._pictures
        return pictures is not None and any(each in pictures for each in ids[at:])

    def _stamp(self) -> list[tuple[int, int]]:
        """Tells whether somebody has written to the weights, moved or added some."""
        return [(each.data_ptr(), each._version) for each in self._attached.model.parameters()]

    def learn(self, ids: Int[Tensor, "1 tokens"], salt: str = "") -> int:
        """Compute ``ids``, a system prompt, as far as it is not known, and remember it.

        Returns the pages added. With exact pages a later prompt can use what was learnt up to
        the end of ``ids``, or of any other text that was learnt, but not up to a place between.
        Raises ValueError for pictures under a salt, which it is not given: ``remember`` what
        ``generate`` saw.
        """
        if salt:
            self._refuse_pictures(_tokens(ids))
        cache = self.new_cache(ids, salt)
        with torch.inference_mode():
            # Without the head: no logits are asked for.
            body: Any = self._attached.model.base_model
            body(input_ids=ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True)
        added = self.remember(ids, cache, salt)
        del cache
        self._evict()
        return added

    def _refuse_pictures(self, tokens: list[int]) -> None:
        named = self._pictures
        if named is None or isinstance(named, _EveryToken):
            return
        at = next((at for at, each in enumerate(tokens) if each in named), None)
        if at is not None:
            raise ValueError(
                f"ids: expected text to learn, got a picture's or sound's place, token "
                f"{tokens[at]}, at {at}; remember() keeps what generate() computed with it"
            )

    def remember(self, ids: Int[Tensor, "1 tokens"], cache: QuantPageCache, salt: str = "") -> int:
        """Remember the full pages of ``cache``, which holds ``ids`` (what ``generate`` returned,
        say); pages added.

        salt: as in ``new_cache``; without one nothing from the first picture on is remembered.
        Raises ValueError for a cache that these prompts did not make, or with several rows.
        """
        if cache.rows.memory is not self._memory:
            raise ValueError("cache: expected one that new_cache() of these prompts made")
        cache.flush()
        _refuse_other_state(cache)
        if cache.rows.count != 1 or cache.rows.padded:
            raise ValueError("cache: expected one row without padding, got others")
        if self._limit is not None and cache.get_seq_length() > self._limit:
            return 0
        tokens = self._usable(_tokens(ids), salt)
        return self._memory.ledger.whole(self._insert, tokens, cache, salt.encode())

    def _insert(self, tokens: list[int], cache: QuantPageCache, salt: bytes) -> int:
        tables = {reach: rows[0] for reach, rows in cache.rows.tables.items()}
        return self._known.insert(tokens, tables, salt)

    def _evict(self) -> None:
        if self._max_pages is not None:
            self._known.shrink(self._max_pages)


def save_cache(
    attached: Caching, cache: QuantPageCache, path: Path | str, note: Any = None
) -> None:
    """Write what ``cache`` holds and a note (JSON) to a file, whole or not at all.

    Raises UnsupportedModel for layers with another state than pages.
    """
    _refuse_other_state(cache)
    if not cache.get_seq_length():
        raise ValueError("cache: expected one that holds tokens, got an empty one")
    cache.flush()
    save_rows(cache.rows, path, {"model": _digest(attached), "user": note})


@torch.inference_mode(False)
def load_cache(attached: Caching, path: Path | str) -> tuple[QuantPageCache, Any]:
    """The cache and the note that ``save_cache`` wrote, for the same model and formats.

    Raises CorruptCache where model, formats, page size, heads or channels differ, or the file is
    damaged, CacheError where it cannot be read, UnsupportedModel for layers with another state than
    pages.
    """
    empty = attached.new_cache()
    _refuse_other_state(empty)
    device = next(attached.model.parameters()).device
    saved = read_pages(path)
    if saved.note.get("model") != _digest(attached):
        raise CorruptCache(f"{path}: expected pages of this model, got those of another")
    layers = {each.index: each.reach for each in empty.paged()}
    try:
        # Before the note, whose page tables another format or page size would seem to damage.
        check_layouts(saved.layouts, _layouts(attached))
        tables = saved_tables(empty.rows.memory, saved, layers)
        rows = saved_rows(empty.rows.memory, saved, tables, device)
    except Damaged as error:
        raise CorruptCache(f"{path}: {error}") from error
    made = empty.over(rows)
    made.set_length(rows.length)
    return made, saved.note.get("user")


def _layouts(attached: Caching) -> dict[int, CacheLayout]:
    """What a forward of this model caches, from one of two tokens: a configuration need not name
    its heads and channels, and a file is not believed. One token would be taken for a step behind
    a prompt by some (GIT), which asks for more than tokens."""
    cache = attached.new_cache()
    # Two may be more than the attachment's rows will hold.
    cache.rows.memory.max_tokens = None
    body: Any = attached.model.base_model
    first = torch.zeros(1, 2, dtype=torch.long, device=next(body.parameters()).device)
    with torch.no_grad():
        body(input_ids=first, past_key_values=cache, use_cache=True)
    return cache.rows.memory.layouts


def _digest(attached: Caching) -> str:
    return model_digest(attached.model, attached.options.mask)


def _refuse_look_ahead(mask: Mask) -> None:
    """UnsupportedModel where a token sees later ones: its keys depend on what follows it."""
    for request in range(mask.requests):
        # Past what it describes a mask is causal, unless it is another rule everywhere.
        length = max(mask.described(request), 1) + 1
        closed = (~mask.cuts(length, request)).nonzero()
        if len(closed):
            raise UnsupportedModel(
                f"mask: expected one under which no token sees a later one, as a page is known by "
                f"the tokens up to its end; got one in which tokens before "
                f"{int(closed[0])} see tokens after it"
            )


def _length_limit(config: Any) -> int | None:
    """Tokens up to which keys do not depend on the length of the prompt; None: never.

    Rotary embeddings that are scaled by the length (longrope, dynamic) switch there.
    """
    text = text_config(config)
    given = getattr(text, "rope_parameters", None) or {}
    limits = []
    for each in [given, *(part for part in given.values() if isinstance(part, dict))]:
        kind = each.get("rope_type")
        if kind in ("longrope", "dynamic"):
            original = each.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limits.append(int(original or text.max_position_embeddings))
    return min(limits, default=None)


def _placeholders(config: Any) -> set[int] | None:
    """Tokens that stand for pictures or sound; None for a model of text.

    Of a model that does not name them every token might be one.
    """
    if text_config(config) is config:
        return None
    named = {
        value
        for name, value in config.to_dict().items()
        if isinstance(value, int)
        and name.endswith(("_token_id", "_token_index"))
        and name.split("_")[0] in ("image", "video", "audio", "vision", "boi", "eoi", "speech")
    }
    return named or _EveryToken()


class _EveryToken(set[int]):
    def __contains__(self, token: object) -> bool:
        return True


def _tokens(ids: Tensor) -> list[int]:
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"ids: expected one row of tokens, got {tuple(ids.shape)}")
    return ids[0].tolist()


def _refuse_other_state(cache: QuantPageCache) -> None:
    for index, layer in cache.stateful().items():
        raise UnsupportedModel(
            f"layer {index}: expected keys and values in pages as the only state, got "
            f"{type(layer).__name__}, whose state is not kept for later"
        )
