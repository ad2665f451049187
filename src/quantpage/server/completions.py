"""`/v1/completions`: prompts as texts or tokens, whole answers or a stream of them."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from quantpage.engine import Piece, Request
from quantpage.errors import EngineStopped, QuantPageError
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
        prompts = _prompts(served, body.prompt)
        self.requests = [served.request(body, each) for each in prompts]
        self._head = head("text_completion", "cmpl", served.name)
        self._usage = Usage(self.requests)

    async def whole(self) -> dict[str, Any]:
        """The answer when all of it is there."""
        count = len(self.requests) * self._body.answers
        texts, reasons = [""] * count, [""] * count
        choices: list[list[Any]] = [[] for _ in range(count)]
        async for at, piece in self._served.answers(self.requests):
            index = at * self._body.answers + piece.answer
            self._usage.piece(at, piece)
            texts[index] += piece.text
            choices[index] += piece.choices
            if (error := failure(piece)) is not None:
                raise error
            reasons[index] = piece.finish_reason or ""
        made = [
            self._choice(index, texts[index], reasons[index], choices[index])
            for index in range(count)
        ]
        return self._head | {"choices": made, "usage": self._usage.report()}

    async def stream(self) -> AsyncIterator[str]:
        """The same as events."""
        async for at, piece in self._served.answers(self.requests):
            self._usage.piece(at, piece)
            if (error := failure(piece)) is not None:
                yield event({"error": {"message": str(error), "type": "server_error"}})
                return
            if piece.text or piece.choices or piece.finish_reason:
                index = at * self._body.answers + piece.answer
                choice = self._choice(index, piece.text, piece.finish_reason, list(piece.choices))
                so_far = usage_so_far(self._body.stream_options, self._usage)
                yield event(self._head | {"choices": [choice]} | so_far)
        if wants_usage(self._body.stream_options):
            yield event(self._head | {"choices": [], "usage": self._usage.report()})
        yield "data: [DONE]\n\n"

    def _choice(
        self, index: int, text: str, reason: str | None, choices: list[Any]
    ) -> dict[str, Any]:
        made = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        if self._body.logprobs is not None:
            made["logprobs"] = {
                "tokens": [self._named(each.token) for each in choices],
                "token_logprobs": [each.logprob for each in choices],
                "top_logprobs": [
                    # Where two are written alike, the likelier: it comes first.
                    {self._named(token): logprob for token, logprob in reversed(each.top)}
                    for each in choices
                ],
            }
        return made

    def _named(self, token: int) -> str:
        """Its text, or the bytes of a part of a character, as OpenAI writes them."""
        text = self._served.text_of(token)
        told = self._served.bytes_of(token, text)
        if told == text.encode():
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in told)


def _prompts(served: Served, given: Any) -> list[list[int]]:
    if isinstance(given, str):
        return [served.encode(given)]
    if not given:
        raise ValueError("prompt: expected at least one, got an empty list")
    if isinstance(given[0], int):
        return [list(given)]
    return [served.encode(each) if isinstance(each, str) else list(each) for each in given]
