"""What stands before every call: the key, the size of a body, a name for the call."""

import hmac
import json
import uuid
from typing import Any

_OPEN_PATHS = ("/", "/health")
"""Answered without a key: a page without secrets, and what a balancer asks."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: Any, api_key: str | None, max_body: int) -> None:
        self._app, self._key, self._max_body = app, api_key, max_body

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        mark = headers.get(b"x-request-id", b"")[:128] or uuid.uuid4().hex.encode()

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", mark)]
            await send(message)

        if not self._allowed(scope["path"], headers.get(b"authorization", b"")):
            message = "Authorization: expected 'Bearer' and the server's key"
            await _refuse(marked, 401, message, "invalid_api_key")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            await _refuse(marked, 413, self._too_large(), "body_too_large")
            return
        # A body without a length is counted as it comes.
        body, more = b"", scope["method"] in ("POST", "PUT", "PATCH")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body:
                await _refuse(marked, 413, self._too_large(), "body_too_large")
                return
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return given.pop() if given else await receive()

        await self._app(scope, replay, marked)

    def _allowed(self, path: str, sent: bytes) -> bool:
        if self._key is None or path in _OPEN_PATHS:
            return True
        # Compared in constant time: an answer's delay must not tell how much of a key was right.
        return hmac.compare_digest(sent, b"Bearer " + self._key.encode())

    def _too_large(self) -> str:
        return f"body: expected at most {self._max_body} bytes"


async def _refuse(send: Any, status: int, message: str, code: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
