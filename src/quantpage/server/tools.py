"""Calls of tools: asked for through the chat template, found in the answer's text.

Models of the Hermes family (Qwen, SmolLM, many fine-tunes) write a call as
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. Where a call is required, the answer
is held to a JSON schema instead and is the call itself.
"""

import json
import uuid
from typing import Any

from quantpage.server.protocol import ChatBody, NamedTool, ToolBody

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def offered(body: ChatBody) -> list[ToolBody]:
    """The tools that the model is told of."""
    if body.tool_choice not in (None, "none") and not body.tools:
        raise ValueError("tool_choice: expected tools beside it, got none")
    return [] if body.tool_choice == "none" else list(body.tools or [])


def required_schema(body: ChatBody) -> dict[str, Any] | None:
    """What the answer has to be where a call is required; None where it is free."""
    choice, tools = body.tool_choice, body.tools or []
    if isinstance(choice, NamedTool):
        tools = [each for each in tools if each.function.name == choice.function.name]
        if not tools:
            raise ValueError(f"tool_choice: expected one of tools, got {choice.function.name!r}")
    elif choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": each.function.name},
                "arguments": each.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for each in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


class ToolReader:
    """Separates an answer's text from the calls in it, as it comes."""

    def __init__(self, tools: list[ToolBody], whole: bool, one: bool = False) -> None:
        """whole: the answer is a call and nothing else. one: calls behind the first are left out,
        as ``parallel_tool_calls`` asks."""
        self._names = {each.function.name for each in tools}
        self._whole, self._one, self._held = whole, one, ""
        self._after_call = False
        """Line breaks that follow a call belong to it."""
        self.calls: list[dict[str, Any]] = []

    def push(self, text: str, last: bool) -> str:
        """The part of the answer that is no call; ``last``: nothing follows."""
        if not self._names:
            return text
        self._held += text
        if self._whole:
            return self._take_whole() if last else ""
        shown = ""
        while True:
            if self._after_call:
                self._held = self._held.lstrip("\n")
                self._after_call = not self._held
            start = self._held.find(_OPEN)
            if start < 0:
                keep = 0 if last else _beginning(self._held)
                cut = len(self._held) - keep
                shown, self._held = shown + self._held[:cut], self._held[cut:]
                return shown
            end = self._held.find(_CLOSE, start)
            if end < 0 and not last:
                shown, self._held = shown + self._held[:start], self._held[start:]
                return shown
            end = len(self._held) if end < 0 else end
            inner = self._held[start + len(_OPEN) : end]
            call = self._call(inner)
            shown += self._held[:start]
            if call is None:
                # Not a call after all: the client sees what the model wrote.
                shown += self._held[start : end + len(_CLOSE)]
            elif not (self._one and self.calls):
                self.calls.append(call)
            self._held = self._held[end + len(_CLOSE) :]
            self._after_call = call is not None

    def _take_whole(self) -> str:
        text, self._held = self._held, ""
        call = self._call(text)
        if call is None:
            # Cut by its longest length: the client sees what the model wrote.
            return text
        self.calls.append(call)
        return ""

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            found = json.loads(text)
        except ValueError:
            return None
        if not isinstance(found, dict) or found.get("name") not in self._names:
            return None
        arguments = found.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": found["name"], "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _beginning(text: str) -> int:
    """Characters at the end that may become the mark of a call."""
    longest = min(len(text), len(_OPEN) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(_OPEN[:n])), 0)
