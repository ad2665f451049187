"""Requests from a file, answers to a file: the server's calls without a server, in one batch that
is refilled as answers end.

A line of the prompts is the body of a call, `/v1/completions` where it has a ``prompt`` and
`/v1/chat/completions` where it has ``messages``, and may have an ``id`` (else: the line's number).
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantpage.errors import EngineStopped, QuantPageError
from quantpage.server.answer_file import AnswerFile, Id
from quantpage.server.chat import Chat
from quantpage.server.completions import Completion
from quantpage.server.protocol import ChatBody, CompletionBody, first_problem
from quantpage.server.serving import Served


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the prompts."""

    id: Id
    body: dict[str, Any]
    """Of the call, with the defaults for what the line leaves out."""
    mark: str
    """Of what decides the answer: an answer in the file stands for this line if it has the same."""
    problem: str | None = None
    """Why it cannot be asked."""


@dataclass(slots=True)
class Counts:
    """What became of the lines."""

    answered: int = 0
    failed: int = 0
    made_tokens: int = 0


def read_lines(path: Path, defaults: dict[str, Any], setting: dict[str, Any]) -> list[Line]:
    """The lines of a file of prompts; ValueError where it is none, or an id stands twice.

    defaults: of parameters that a line leaves out. setting: what else decides an answer (the model,
    the format).
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file: expected a text file in UTF-8, got {path} ({error})") from error
    lines = list(_lines(text, defaults, json.dumps(setting, sort_keys=True)))
    if not lines:
        raise ValueError(f"file: expected a JSON object a line, got {path} without any")
    first: dict[Id, int] = {}
    for at, each in enumerate(lines):
        if first.setdefault(each.id, at) != at:
            raise ValueError(f"file: expected every id once, got {each.id!r} twice in {path}")
    return lines


def answer_lines(
    served: Served, lines: list[Line], file: AnswerFile, told: Callable[[Counts], None]
) -> Counts:
    """Answer every line, none of which has an answer in the file; ``told`` hears of each that
    ends."""
    counts = Counts()
    asyncio.run(_answer_all(served, lines, file, counts, told))
    return counts


async def _answer_all(
    served: Served,
    lines: list[Line],
    file: AnswerFile,
    counts: Counts,
    told: Callable[[Counts], None],
) -> None:
    left = iter(lines)

    async def work() -> None:
        for each in left:
            made = await _answer(served, each)
            file.append({"id": each.id, "request": each.mark, **made})
            counts.failed += "error" in made
            counts.answered += "error" not in made
            counts.made_tokens += made.get("usage", {}).get("completion_tokens", 0)
            told(counts)

    # Twice what runs: whoever ends has a successor that waits already.
    workers = [asyncio.ensure_future(work()) for _ in range(2 * served.engine.limits.max_running)]
    try:
        await asyncio.gather(*workers)
    finally:
        for each in workers:
            each.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _answer(served: Served, line: Line) -> dict[str, Any]:
    """``choices`` and ``usage`` of a line, or its ``error``."""
    try:
        answer = await _call(served, line).whole()
    except EngineStopped:
        raise
    except ValidationError as error:
        where, message = first_problem(error.errors())
        return {"error": f"{where or 'line'}: {message}"}
    except (ValueError, QuantPageError) as error:
        return {"error": str(error)}
    return {name: answer[name] for name in ("model", "choices", "usage")}


def _call(served: Served, line: Line) -> Chat | Completion:
    body = line.body
    if line.problem is not None:
        raise ValueError(line.problem)
    if body.get("stream"):
        raise ValueError("stream: expected none, as answers go to a file")
    if body.get("model", served.name) != served.name:
        raise ValueError(f"model: expected {served.name!r}, got {body['model']!r}")
    if ("prompt" in body) == ("messages" in body):
        raise ValueError("prompt: expected a prompt or messages, got both or neither")
    if "messages" in body:
        return Chat(served, ChatBody.model_validate(body))
    return Completion(served, CompletionBody.model_validate(body))


def _lines(text: str, defaults: dict[str, Any], setting: str) -> Iterator[Line]:
    # Not splitlines: JSON may hold other separators of lines in its texts.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        own: Id = number
        problem, body = None, {}
        try:
            found = json.loads(line)
            if type(found) is not dict:
                raise ValueError("got something else")
            own = found.pop("id", number)
            body = defaults | found
        except (ValueError, RecursionError) as error:
            problem = f"line {number}: expected a JSON object, got {error}"
        if type(own) not in (str, int):
            own, problem = number, f"id: expected a text or a whole number, got {own!r}"
        asked = line if problem else json.dumps(body, sort_keys=True)
        mark = blake2b(f"{setting}\n{asked}".encode("utf-8", "surrogatepass"), digest_size=8)
        yield Line(own, body, mark.hexdigest(), problem)
