"""A model behind the server: prompts to tokens, bodies to engine requests, answers as they come."""

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from quantpage.engine import Engine, Piece, Request, Sampling, Ticket
from quantpage.engine.grammar import ANY_OBJECT, AnswerGrammar, GrammarTokenizer
from quantpage.errors import EngineStopped, QueueFull
from quantpage.server.metrics import Metrics
from quantpage.server.protocol import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    Message,
    TemplateFlags,
)


class TooLong(ValueError):
    """A prompt and its answer that do not fit the context: clients know it by OpenAI's code."""

    code = "context_length_exceeded"


@dataclass(slots=True)
class Served:
    """One model, its tokenizer, its engine, and what is counted about it."""

    name: str
    engine: Engine
    tokenizer: Any
    context: int
    """Most tokens of a prompt and its answer."""
    stop_tokens: frozenset[int]
    vocabulary: int
    defaults: dict[str, float]
    """Sampling of the model's generation_config.json, for what a body leaves out."""
    metrics: Metrics
    prefix_file: Path | None = None
    """Where known prompts are kept over restarts."""
    _names: dict[int, str] = field(default_factory=dict)
    """Of tokens that were told of, each of which is decoded once."""
    _grammars: GrammarTokenizer | None = None
    _making: threading.Lock = field(default_factory=threading.Lock)
    """Bodies are read in threads; one of them makes the table."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)

    def text_of(self, token: int) -> str:
        """A token's own text. Of one token alone some tokenizers leave the space out with which it
        begins, as they do of an answer's first."""
        text, name = self.tokenizer.decode([token]), self.tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return f"token_id:{token}"
        spaced = name.startswith(_SPACE) and not text.startswith(" ")
        return " " + text if spaced else text

    def bytes_of(self, token: int, text: str) -> bytes:
        """What a token, whose text this is, adds to an answer: also a part of a character, in the
        two ways of writing one, byte-level BPE's alphabet and SentencePiece's ``<0xE2>``."""
        name = self.tokenizer.convert_ids_to_tokens(token) if _PART in text else None
        if name is None:
            return text.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes.fromhex(name[3:5])
        found = [_BYTES.get(letter) for letter in name]
        return text.encode() if None in found else bytes(each for each in found if each is not None)

    def named(self, token: int) -> str:
        """A token's text, or the bytes of a part of a character, as OpenAI writes them."""
        name = self._names.get(token)
        if name is None:
            name = text = self.text_of(token)
            told = self.bytes_of(token, text)
            if told != text.encode():
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in told)
            self._names[token] = name
        return name

    def is_special(self, token: int) -> bool:
        """Whether a token is no part of a text, as the end of an answer."""
        added = self.tokenizer.added_tokens_decoder.get(token)
        return added is not None and added.special

    def render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, flags: TemplateFlags
    ) -> list[int]:
        """The tokens of a chat through the model's template; ValueError in one sentence."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise ValueError("messages: this model has no chat template; use /v1/completions")
        plain = [_plain(each) for each in messages]
        continued = bool(flags.continue_final_message)
        begins = flags.add_generation_prompt
        if continued and (begins or plain[-1]["role"] != "assistant"):
            what = "add_generation_prompt" if begins else f"a message of the {plain[-1]['role']}"
            raise ValueError(
                f"continue_final_message: expected an assistant's message at the end, got {what}"
            )
        options = {
            **self._template_options(flags.chat_template_kwargs or {}),
            "add_generation_prompt": not continued if begins is None else begins,
            "continue_final_message": continued,
            "tokenize": False,
        }
        try:
            text = self.tokenizer.apply_chat_template(plain, tools=tools, **options)
            if tools and text == self.tokenizer.apply_chat_template(plain, **options):
                raise ValueError("tools: this model's chat template does not know tools")
        except (TemplateError, KeyError, TypeError) as error:
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from None
        return self.encode(text, special=False)

    def _template_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """``chat_template_kwargs``, all of which the template has to read."""
        template = self.tokenizer.chat_template
        known = template if isinstance(template, str) else " ".join(template.values())
        own = signature(self.tokenizer.apply_chat_template).parameters
        for name in given:
            if name in own or not re.search(rf"\b{re.escape(name)}\b", known):
                raise ValueError(
                    "chat_template_kwargs: expected names that the model's chat template reads, "
                    f"got {name!r}"
                )
        return given

    def request(
        self, body: GenerationBody, prompt: list[int], call: dict[str, Any] | None = None
    ) -> Request:
        """What the engine is asked; ValueError names the parameter that cannot be.

        call: the JSON schema of a call of a tool that the answer has to be.
        """
        if not prompt:
            raise ValueError("prompt: expected at least one token, got none")
        if body.stream_options is not None and not body.stream:
            raise ValueError("stream_options: expected none where stream is not true")
        self._refuse_tokens("prompt", prompt)
        room = self.context - len(prompt)
        wanted = getattr(body, "max_completion_tokens", None) or body.max_tokens
        told = _prompt_logprobs(body)
        if wanted == 0 and told is None and not getattr(body, "echo", None):
            raise ValueError(
                "max_tokens: expected at least 1 without echo or prompt_logprobs, got 0"
            )
        if (1 if wanted is None else wanted) > room:
            asked = "" if wanted is None else f" and {wanted} more"
            raise TooLong(
                f"max_tokens: expected at most {self.context} tokens together, "
                f"got a prompt of {len(prompt)}{asked}"
            )
        if wanted is None:
            most = 16 if isinstance(body, CompletionBody) else room
            wanted = max(1, min(most, room, self.engine.room(len(prompt), body.answers)))
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        ends = frozenset() if body.ignore_eos else self.stop_tokens
        self._refuse_tokens("stop_token_ids", body.stop_token_ids or ())
        return Request(
            prompt=tuple(prompt),
            max_tokens=wanted,
            sampling=self._sampling(body),
            stop=stop,
            stop_tokens=ends.union(body.stop_token_ids or ()),
            min_tokens=body.min_tokens or 0,
            keep_stop=bool(body.include_stop_str_in_output),
            keep_special=body.skip_special_tokens is False,
            answers=body.answers,
            logprobs=_logprobs(body),
            prompt_logprobs=told,
            grammar=self._grammar(body, call),
        )

    async def answers(self, requests: list[Request]) -> AsyncIterator[tuple[int, Piece]]:
        """(request, piece) of all of them as they come; leaving early cancels what is left.

        The first finds a place or raises QueueFull; those behind it wait here for one, so that a
        call may have more prompts than the engine's queue has places.
        """
        for request in requests:
            self.engine.refuse(request)
        loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

        def listener(at: int) -> Any:
            def emit(piece: Piece) -> None:
                # The loop may be closed already when the server stops.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(news.put_nowait, (at, piece))

            return emit

        # Who ends has a successor that waits already, and other clients find places beside a long
        # list of prompts.
        most = 2 * self.engine.limits.max_running
        tickets: list[Ticket] = []
        under_way, look, stopped = 0, True, False
        watches = [self.metrics.watch(each) for each in requests]
        try:
            while under_way or len(tickets) < len(requests):
                try:
                    for at in range(len(tickets), len(requests) if look and not stopped else 0):
                        if under_way >= most:
                            break
                        tickets.append(self.engine.submit(requests[at], listener(at)))
                        under_way += requests[at].answers
                except (QueueFull, EngineStopped) as error:
                    if not tickets:
                        raise
                    stopped = isinstance(error, EngineStopped)
                if stopped and not under_way:
                    yield len(tickets), Piece(0, finish_reason="cancelled")
                    return
                if not under_way:
                    # Others have all places, and nobody tells when one is free.
                    await asyncio.sleep(_LOOKS_AGAIN)
                    continue
                at, piece = await news.get()
                watches[at].piece(piece)
                look = piece.finish_reason is not None
                under_way -= look
                yield at, piece
        finally:
            for ticket in tickets:
                self.engine.cancel(ticket)
            # Of who leaves nobody reads the end.
            for _ in range(under_way):
                self.metrics.ended("cancelled")

    def _sampling(self, body: GenerationBody) -> Sampling:
        given = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": None if body.top_k is None else max(body.top_k, 0),
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
        }
        chosen: dict[str, Any] = self.defaults | {
            name: value for name, value in given.items() if value is not None
        }
        return Sampling(
            **chosen,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=self._bias(body.logit_bias or {}),
            seed=body.seed,
        )

    def _bias(self, given: dict[str, float]) -> tuple[tuple[int, float], ...]:
        made = []
        for token, bias in given.items():
            if not token.isdecimal() or int(token) >= self.vocabulary:
                raise ValueError(
                    f"logit_bias: expected token ids below {self.vocabulary}, got {token!r}"
                )
            made.append((int(token), bias))
        return tuple(made)

    def _refuse_tokens(self, name: str, given: Iterable[int]) -> None:
        bad = [token for token in given if not 0 <= token < self.vocabulary]
        if bad:
            raise ValueError(f"{name}: expected tokens below {self.vocabulary}, got {bad[0]}")

    def _grammar(self, body: GenerationBody, call: dict[str, Any] | None) -> AnswerGrammar | None:
        asked = grammars_of(body)
        if call is not None:
            if asked:
                raise ValueError(f"{asked[0][0]}: expected none beside a required tool call")
            asked = [("tools", "json", call)]
        if not asked:
            return None
        if len(asked) > 1:
            names = " and ".join(name for name, _, _ in asked)
            raise ValueError(f"{asked[0][0]}: expected one form of an answer, got {names}")
        with self._making:
            if self._grammars is None:
                self._grammars = GrammarTokenizer(self.tokenizer, self.vocabulary)
        name, kind, form = asked[0]
        try:
            return AnswerGrammar(kind, form, self._grammars)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


_LOOKS_AGAIN = 0.05
"""Seconds between two looks for a place."""
_SPACE = "\u2581"
"""SentencePiece's."""
_PART = "\ufffd"
"""What tokenizers write for a part of a character."""
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_BYTES = {chr(byte): byte for byte in _SHOWN} | {chr(256 + at): b for at, b in enumerate(_HIDDEN)}
"""Byte-level BPE's letters (GPT-2): those that can be printed are themselves."""


def grammars_of(body: GenerationBody) -> list[tuple[str, str, Any]]:
    """(parameter, kind, form) of all that an answer has to follow, of ``AnswerGrammar``'s kinds."""
    made: list[tuple[str, str, Any]] = []
    wanted, others = body.response_format, body.structured_outputs
    if wanted is not None and wanted.type == "json_object":
        made.append(("response_format", "json", ANY_OBJECT))
    if wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise ValueError("response_format: expected a json_schema with a schema, got none")
        made.append(("response_format", "json", wanted.json_schema.schema_))
    if others is not None:
        forms = (
            ("json", others.json_),
            ("json", ANY_OBJECT if others.json_object else None),
            ("regex", others.regex),
            ("choice", others.choice),
            ("grammar", others.grammar),
        )
        found = [("structured_outputs", kind, form) for kind, form in forms if form is not None]
        if not found:
            raise ValueError(
                "structured_outputs: expected json, json_object, regex, choice or grammar, got none"
            )
        made += found
    return made


def _logprobs(body: GenerationBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs is not None and not body.logprobs:
        raise ValueError("top_logprobs: expected logprobs to be true beside it")
    return (body.top_logprobs or 0) if body.logprobs else None


def _prompt_logprobs(body: GenerationBody) -> int | None:
    """As many as one of the two ways to ask for them wants."""
    if body.prompt_logprobs is not None and body.stream:
        raise ValueError("prompt_logprobs: expected none where stream is true")
    echoed = body.logprobs if isinstance(body, CompletionBody) and body.echo else None
    return max((each for each in (body.prompt_logprobs, echoed) if each is not None), default=None)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates know it: parts that are texts joined, others refused."""
    made = {key: value for key, value in message.model_dump().items() if value is not None}
    made.setdefault("content", "")
    if isinstance(made["content"], list):
        wrong = [part.get("type") for part in made["content"] if part.get("type") != "text"]
        if wrong:
            raise ValueError(f"messages: expected content of texts alone, got a part {wrong[0]!r}")
        made["content"] = "".join(str(part.get("text", "")) for part in made["content"])
    if made["role"] == "developer":
        made["role"] = "system"
    if isinstance(made.get("tool_calls"), list):
        made["tool_calls"] = [_call(each) for each in made["tool_calls"]]
    return made


def _call(call: Any) -> Any:
    """An earlier call of a tool, whose arguments clients send as JSON in a text and templates write
    as JSON: as they are, not as a text of a text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    if not isinstance(arguments, dict):
        return call
    return call | {"function": function | {"arguments": arguments}}
