"""`/v1/chat/completions`: messages through the model's template, tools, JSON, streams."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from quantpage.engine import Piece, TokenChoice
from quantpage.server.completions import Usage, event, failure, head, usage_so_far, wants_usage
from quantpage.server.logprobs import of_prompt, said
from quantpage.server.protocol import ChatBody
from quantpage.server.serving import Served
from quantpage.server.tools import ToolReader, offered, required_schema


class Chat:
    """One call of `/v1/chat/completions`."""

    def __init__(self, served: Served, body: ChatBody) -> None:
        self._served, self._body = served, body
        tools = offered(body)
        schema = required_schema(body)
        whole, one = schema is not None, body.parallel_tool_calls is False
        self._reader_of = [ToolReader(tools, whole, one) for _ in range(body.answers)]
        # A call that is required comes by the schema; the template may not know tools.
        told = [each.model_dump(exclude_none=True) for each in tools] if schema is None else None
        prompt = served.render(body.messages, told or None, body)
        self.requests = [served.request(body, prompt, schema)]
        self._head = head("chat.completion", "chatcmpl", served.name)
        self._usage = Usage(self.requests)

    async def whole(self) -> dict[str, Any]:
        """The answer when all of it is there."""
        count = self._body.answers
        texts, reasons = [""] * count, [""] * count
        choices: list[list[Any]] = [[] for _ in range(count)]
        told: list[TokenChoice] = []
        async for at, piece in self._served.answers(self.requests):
            index = piece.answer
            told += piece.prompt
            self._usage.piece(at, piece)
            if (error := failure(piece)) is not None:
                raise error
            texts[index] += self._reader_of[index].push(piece.text, piece.finish_reason is not None)
            choices[index] += piece.choices
            reasons[index] = piece.finish_reason or ""
        made = []
        for index in range(count):
            calls = self._reader_of[index].calls
            message: dict[str, Any] = {
                "role": "assistant",
                "content": texts[index] or (None if calls else ""),
            }
            if calls:
                message["tool_calls"] = calls
            made.append(
                {
                    "index": index,
                    "message": message,
                    "finish_reason": "tool_calls" if calls else reasons[index],
                    "logprobs": self._logprobs(choices[index]),
                }
            )
        whole = self._head | {"choices": made, "usage": self._usage.report()}
        if (top := self._body.prompt_logprobs) is not None:
            # In a thread, as it takes long: nobody else's stream waits for it.
            whole["prompt_logprobs"] = await asyncio.to_thread(of_prompt, self._served, told, top)
        return whole

    async def stream(self) -> AsyncIterator[str]:
        """The same as events."""
        self._head["object"] = "chat.completion.chunk"
        for index in range(self._body.answers):
            yield self._event(index, {"role": "assistant", "content": ""})
        async for at, piece in self._served.answers(self.requests):
            self._usage.piece(at, piece)
            if (error := failure(piece)) is not None:
                yield event({"error": {"message": str(error), "type": "server_error"}})
                return
            for made in self._events(piece):
                yield made
        if wants_usage(self._body.stream_options):
            yield event(self._head | {"choices": [], "usage": self._usage.report()})
        yield "data: [DONE]\n\n"

    def _events(self, piece: Piece) -> list[str]:
        reader, ended = self._reader_of[piece.answer], piece.finish_reason is not None
        text, made = reader.push(piece.text, ended), []
        if text or piece.choices:
            made.append(self._event(piece.answer, {"content": text}, piece))
        if ended:
            calls = [call | {"index": at} for at, call in enumerate(reader.calls)]
            if calls:
                made.append(self._event(piece.answer, {"tool_calls": calls}))
            reason = "tool_calls" if calls else piece.finish_reason
            made.append(self._event(piece.answer, {}, reason=reason))
        return made

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        piece: Piece | None = None,
        reason: str | None = None,
    ) -> str:
        logprobs = None if piece is None else self._logprobs(list(piece.choices))
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        so_far = usage_so_far(self._body.stream_options, self._usage)
        return event(self._head | {"choices": [choice]} | so_far)

    def _logprobs(self, choices: list[Any]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [self._choice(each) for each in choices], "refusal": None}

    def _choice(self, choice: Any) -> dict[str, Any]:
        made = self._token(choice.token, choice.logprob)
        made["top_logprobs"] = [self._token(token, logprob) for token, logprob in choice.top]
        return made

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._served.text_of(token)
        told = list(self._served.bytes_of(token, text))
        return {"token": text, "logprob": said(logprob), "bytes": told}
