"""`/v1/completions`: prompts as texts or tokens, whole answers or a stream of them."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from quantpage.engine import Piece, Request, TokenChoice
from quantpage.errors import EngineStopped, QuantPageError
from quantpage.server.logprobs import TextLogprobs, of_prompt
from quantpage.server.protocol import CompletionBody, StreamOptions
from quantpage.server.serving import Served


class Usage:
    """Tokens of a call, as OpenAI reports them."""

    def __init__(self, requests: list[Request]) -> None:
        self._prompts = sum(len(each.prompt) for each in requests)
        self._made: dict[tuple[int, int], int] = {}
        self._cached: dict[int, int] = {}

    def piece(self, at: int, piece: Piece) -> None:
        """News of request ``at``."""
        self._made[at, piece.answer] = piece.made
        self._cached[at] = piece.cached

    def report(self) -> dict[str, Any]:
        """``usage``."""
        made = sum(self._made.values())
        return {
            "prompt_tokens": self._prompts,
            "completion_tokens": made,
            "total_tokens": self._prompts + made,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


def head(kind: str, mark: str, name: str) -> dict[str, Any]:
    """What every answer begins with."""
    return {
        "id": f"{mark}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
    }


def event(data: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def failure(piece: Piece) -> QuantPageError | None:
    """What the client is told of an answer that did not come to its end; None: it may."""
    if piece.finish_reason == "cancelled":
        # Who leaves does not hear of it: only an engine that stops says this to somebody.
        return EngineStopped("the answer was ended before it was done, as the server is stopping")
    if piece.finish_reason == "error":
        return QuantPageError(f"the answer failed: {piece.error}")
    return None


def wants_usage(options: StreamOptions | None) -> bool:
    """Whether a stream ends with the tokens that were counted."""
    return options is not None and options.include_usage


def usage_so_far(options: StreamOptions | None, usage: Usage) -> dict[str, Any]:
    """What an event of a stream says of it beside its choice."""
    always = wants_usage(options) and options is not None and options.continuous_usage_stats
    return {"usage": usage.report()} if always else {}


class Completion:
    """One call of `/v1/completions`."""

    def __init__(self, served: Served, body: CompletionBody) -> None:
        self._served, self._body = served, body
        keep_special = body.skip_special_tokens is False
        prompts = _prompts(served, body)
        self.requests = [served.request(body, each) for each in prompts]
        self._head = head("text_completion", "cmpl", served.name)
        self._usage = Usage(self.requests)
        self._told: list[list[TokenChoice]] = [[] for _ in prompts]
        """Of the prompts' tokens, so far."""
        self._logprobs = [
            TextLogprobs(served, body.logprobs or 0, keep_special)
            for _ in range(len(prompts) * body.answers)
        ]
        self._echoes: list[str | None] = [None] * len(self._logprobs)
        """What an answer begins with; None once it has begun."""
        if body.echo:
            texts = [
                text
                if isinstance(text, str)
                else served.tokenizer.decode(prompt, skip_special_tokens=not keep_special)
                for text, prompt in zip(_each(body.prompt), prompts, strict=True)
            ]
            self._echoes = [text for text in texts for _ in range(body.answers)]

    async def whole(self) -> dict[str, Any]:
        """The answer when all of it is there."""
        count = len(self._logprobs)
        texts, reasons = [""] * count, [""] * count
        choices: list[list[TokenChoice]] = [[] for _ in range(count)]
        async for at, piece in self._served.answers(self.requests):
            index = at * self._body.answers + piece.answer
            self._usage.piece(at, piece)
            self._told[at] += piece.prompt
            texts[index] += piece.text
            choices[index] += piece.choices
            if (error := failure(piece)) is not None:
                raise error
            reasons[index] = piece.finish_reason or ""

        def written() -> list[dict[str, Any]]:
            return [
                self._choice(index, texts[index], reasons[index], choices[index])
                for index in range(count)
            ]

        # In a thread where it takes long: nobody else's stream waits for it.
        made = await asyncio.to_thread(written) if any(self._told) else written()
        return self._head | {"choices": made, "usage": self._usage.report()}

    async def stream(self) -> AsyncIterator[str]:
        """The same as events."""
        async for at, piece in self._served.answers(self.requests):
            self._usage.piece(at, piece)
            self._told[at] += piece.prompt
            if (error := failure(piece)) is not None:
                yield event({"error": {"message": str(error), "type": "server_error"}})
                return
            if piece.text or piece.choices or piece.finish_reason:
                index = at * self._body.answers + piece.answer
                given = (index, piece.text, piece.finish_reason, list(piece.choices))
                long = self._echoes[index] is not None
                choice = (
                    await asyncio.to_thread(self._choice, *given) if long else self._choice(*given)
                )
                so_far = usage_so_far(self._body.stream_options, self._usage)
                yield event(self._head | {"choices": [choice]} | so_far)
        if wants_usage(self._body.stream_options):
            yield event(self._head | {"choices": [], "usage": self._usage.report()})
        yield "data: [DONE]\n\n"

    def _choice(
        self, index: int, text: str, reason: str | None, choices: list[TokenChoice]
    ) -> dict[str, Any]:
        at = index // self._body.answers
        echo, self._echoes[index] = self._echoes[index], None
        first = None
        if echo is not None:
            text, first = echo + text, self.requests[at].prompt[0]
            choices = self._told[at] + choices
        made = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        if self._body.logprobs is not None:
            made["logprobs"] = self._logprobs[index].piece(text, choices, first)
        if self._body.prompt_logprobs is not None:
            made["prompt_logprobs"] = of_prompt(
                self._served, self._told[at], self._body.prompt_logprobs
            )
        return made


def _prompts(served: Served, body: CompletionBody) -> list[list[int]]:
    special = body.add_special_tokens is not False
    return [
        served.encode(each, special) if isinstance(each, str) else list(each)
        for each in _each(body.prompt)
    ]


def _each(given: Any) -> list[Any]:
    """The texts and lists of tokens that a call's prompts are."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ValueError("prompt: expected at least one, got an empty list")
    return [given] if isinstance(given[0], int) else given
