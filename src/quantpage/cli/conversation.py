"""A conversation over one cache that is kept: a turn computes only what the cache does not hold."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteriaList

from quantpage.cli.generation import (
    GenerateRequest,
    Printer,
    Stopped,
    check_text,
)
from quantpage.errors import CacheError, CorruptCache
from quantpage.integrations.hf_transformers.attach import Attached
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.loading.model import most_positions


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn took."""

    prompt_tokens: int
    """Of the whole conversation, the new question included."""
    kept_tokens: int
    """Of these, in the cache already."""
    made_tokens: int
    seconds: float
    interrupted: bool
    """Ctrl-C: the answer is as far as it came."""


class Conversation:
    """Messages, and the cache that holds them as far as they were computed."""

    def __init__(self, attached: Attached, tokenizer: Any, request: GenerateRequest) -> None:
        """request: everything but its prompts. ValueError for a model without a chat template."""
        if tokenizer.chat_template is None:
            raise ValueError(
                f"model: expected one with a chat template, got {request.model}, which "
                "`quantpage generate` can continue texts with"
            )
        self._attached, self._tokenizer = attached, tokenizer
        self._model: Any = attached.model
        self._request = request
        self._limit = most_positions(self._model.config)
        torch.manual_seed(request.sampling.seed)
        self.messages: list[dict[str, str]] = []
        self._held: tuple[QuantPageCache, list[int]] = (attached.new_cache(), [])
        """A cache and the tokens in it; both at once, since Ctrl-C may come between any two lines.
        """
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        system = self._request.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._forget()

    def say(self, text: str, write: Callable[[str], None]) -> Turn:
        """Ask, and hand the answer to ``write`` piece by piece; Ctrl-C ends it, and nothing else.

        ValueError, with the conversation as it was, where it is too long for the model or no text.
        """
        check_text("question", text)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(messages)
        room = None if self._limit is None else self._limit - len(ids)
        if room is not None and room < 1:
            raise ValueError(
                f"conversation: expected fewer than {self._limit:,} tokens, as the model has so "
                f"many positions; got {len(ids):,} (/reset begins anew)"
            )
        kept = self._keep_common(ids)
        request, start = self._request, time.perf_counter()
        printer = Printer(self._tokenizer, request.stop, write)
        given = torch.tensor([ids], device=self._model.device)
        interrupted = False
        try:
            self._model.generate(
                given,
                attention_mask=torch.ones_like(given),
                past_key_values=self._held[0],
                max_new_tokens=min(request.max_new_tokens, room or request.max_new_tokens),
                streamer=printer,
                stopping_criteria=StoppingCriteriaList([Stopped(printer)]),
                pad_token_id=self._model.generation_config.pad_token_id or 0,
                **request.sampling.arguments(),
            )
        except KeyboardInterrupt:
            interrupted = True
        except BaseException:
            self._forget()
            raise
        # Of the answer, the cache holds what was fed back: all but the last token.
        cache = self._held[0]
        self._held = cache, [*ids, *printer.tokens][: cache.get_seq_length()]
        said = printer.text
        # A question that got no word of an answer was not asked.
        if said or not interrupted:
            self.messages = [*messages, {"role": "assistant", "content": said}]
        seconds = time.perf_counter() - start
        return Turn(len(ids), kept, len(printer.tokens), seconds, interrupted)

    def held_bytes(self) -> int:
        """Of the cache."""
        return self._held[0].allocated_bytes()

    def save(self, path: Path | str) -> None:
        """Write messages and cache to a file, whole or not at all."""
        cache, tokens = self._held
        self._attached.save_cache(cache, path, {"messages": self.messages, "tokens": tokens})

    def load(self, path: Path | str) -> None:
        """Go on with what ``save`` wrote; where it raises, the conversation is as it was."""
        cache, note = self._attached.load_with_note(path)
        tokens = note.get("tokens") if type(note) is dict else None
        messages = note.get("messages") if type(note) is dict else None
        if (
            type(tokens) is not list
            or type(messages) is not list
            or len(tokens) != cache.get_seq_length()
            or cache.rows.count != 1
            or not all(type(each) is int for each in tokens)
            or not all(type(each) is dict and set(each) == {"role", "content"} for each in messages)
        ):
            raise CorruptCache(f"{path}: expected a conversation, got a cache without its messages")
        self._held = cache, tokens
        self.messages = messages

    def _forget(self) -> None:
        self._held = self._attached.new_cache(), []

    def _keep_common(self, ids: list[int]) -> int:
        """Cut the cache to what it has in common with ``ids``, short of the last; its length.

        Not always all of it: a template may leave parts of old answers out, and a tokenizer may
        cut an answer's text otherwise than the model wrote it.
        """
        cache, tokens = self._held
        if cache.get_seq_length() != len(tokens):
            # An interruption came between a step or a crop and its being noted here.
            tokens = []
        pairs = zip(ids[:-1], tokens, strict=False)
        differing = (at for at, (mine, held) in enumerate(pairs) if mine != held)
        common = next(differing, min(len(ids) - 1, len(tokens)))
        if 0 < common < len(tokens):
            try:
                cache.crop(common)
            except CacheError:
                # Pages that the next token would read are gone: windows, exact pages.
                common = 0
        if common:
            self._held = cache, tokens[:common]
        else:
            self._forget()
        return common

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ValueError(
                f"messages: expected what the model's chat template takes ({error})"
            ) from error
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)
