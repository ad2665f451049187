"""The HTTP application: paths, errors in OpenAI's form, the page at `/`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

import quantpage
from quantpage.errors import EngineStopped, QuantPageError, QueueFull
from quantpage.server.chat import Chat
from quantpage.server.completions import Completion
from quantpage.server.guard import Guard
from quantpage.server.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ErrorBody,
    TemplateFlags,
    TokenizeBody,
    first_problem,
)
from quantpage.server.serving import Served

_RETRY_AFTER = "1"
"""Seconds after which a full queue may be asked again."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in (
        (400, "A parameter that cannot be, by its name"),
        (401, "Not the server's key"),
        (404, "Not here"),
        (413, "A body that is too large"),
        (429, "The queue is full; Retry-After says when to come again"),
        (500, "The answer failed"),
        (503, "The server ends"),
    )
}
_PAGE = Path(__file__).with_name("page.html")
_NOT_HERE = ("embeddings", "responses", "audio/speech", "images/generations", "moderations")


def create_app(
    served: Served,
    api_key: str | None = None,
    max_body: int = 8 << 20,
    allow_origins: Sequence[str] = (),
) -> FastAPI:
    """The application over one model.

    api_key: None: everybody may ask. max_body: bytes. allow_origins: of web pages whose calls
    browsers let through (CORS); '*': of all.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # No connection is left: whoever runs the application has let answers end (stopping.py).
        await asyncio.to_thread(served.engine.stop)

    # The interactive pages of FastAPI load scripts from elsewhere; /openapi.json says the same.
    about: dict[str, Any] = {"title": "QuantPage", "version": quantpage.__version__}
    app = FastAPI(**about, lifespan=lifespan, docs_url=None, redoc_url=None, responses=_ERRORS)
    _describe(app)
    app.add_middleware(Guard, api_key=api_key, max_body=max_body)
    if allow_origins:
        # Around the guard: a browser asks beforehand, without the key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    _errors(app)
    _generation(app, served)
    _facts(app, served)
    return app


def _describe(app: FastAPI) -> None:
    """/openapi.json without the status that FastAPI has for wrong bodies, which are 400 here."""
    usual = app.openapi

    def described() -> dict[str, Any]:
        made = usual()
        for path in made["paths"].values():
            for call in path.values():
                call["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        return made

    vars(app)["openapi"] = described


def _generation(app: FastAPI, served: Served) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        _check_model(served, body.model)
        return await _respond(await _prepared(Chat, served, body), bool(body.stream), request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        _check_model(served, body.model)
        return await _respond(await _prepared(Completion, served, body), bool(body.stream), request)

    for path in _NOT_HERE:

        @app.post(f"/v1/{path}", include_in_schema=False)
        async def refused(request: Request) -> None:
            raise HTTPException(
                404,
                f"{request.url.path}: this server generates text; expected /v1/chat/completions "
                "or /v1/completions",
            )


def _facts(app: FastAPI, served: Served) -> None:
    # Two savings at once would only hold the pages twice.
    saving = asyncio.Lock()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        card = {"id": served.name, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [card | {"max_model_len": served.context}]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The one model, by its name."""
        _check_model(served, name)
        return (await models())["data"][0]

    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> Response:
        """200 while requests are taken."""
        return PlainTextResponse(status_code=200 if served.engine.alive else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Of this package."""
        return {"version": quantpage.__version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters in Prometheus' format."""
        return Response(served.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.post("/prefix_cache/save")
    async def save_prefixes() -> dict[str, Any]:
        """Write the known prompts to the file that the server was started with."""
        if served.prefix_file is None:
            raise HTTPException(404, "expected a server with --prefix-cache-file, got none")
        async with saving:
            pages = await asyncio.to_thread(served.engine.save_prefixes, served.prefix_file)
        return {"pages": pages}

    # Not async: both run in a thread of their own.
    @app.post("/tokenize")
    def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """A text's tokens."""
        _check_model(served, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ValueError("prompt: expected a prompt or messages, got both or neither")
        if body.messages is not None:
            if body.add_special_tokens:
                raise ValueError("add_special_tokens: expected none beside messages, got true")
            tools = [each.model_dump(exclude_none=True) for each in body.tools or []]
            tokens = served.render(body.messages, tools or None, body)
        else:
            _refuse_beside_prompt(body)
            tokens = served.encode(body.prompt or "", body.add_special_tokens is not False)
        made = {"tokens": tokens, "count": len(tokens), "max_model_len": served.context}
        if body.return_token_strs:
            made["token_strs"] = served.tokenizer.convert_ids_to_tokens(tokens)
        return made

    @app.post("/detokenize")
    def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """Tokens' text."""
        _check_model(served, body.model)
        bad = [token for token in body.tokens if token >= served.vocabulary]
        if bad:
            raise ValueError(f"tokens: expected ids below {served.vocabulary}, got {bad[0]}")
        return {"prompt": served.tokenizer.decode(body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The tokens and the template with which clients write prompts by themselves."""
        known, template = served.tokenizer, served.tokenizer.chat_template
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return {
            "tokenizer_class": type(known).__name__,
            **{name: getattr(known, name) for name in names},
            "chat_template": template.get("default") if isinstance(template, dict) else template,
        }

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return _PAGE.read_text("utf-8")


def _refuse_beside_prompt(body: TokenizeBody) -> None:
    for name in ("tools", *TemplateFlags.model_fields):
        if getattr(body, name) is not None:
            raise ValueError(f"{name}: expected none beside a prompt, which has no chat template")


async def _prepared(kind: Callable[[Served, Any], Any], served: Served, body: Any) -> Any:
    """The call of a body, whose text becomes tokens in a thread: megabytes take seconds, as the
    first JSON grammar does, and nobody else's stream waits for them."""
    return await asyncio.to_thread(kind, served, body)


async def _respond(call: Any, stream: bool, request: Request) -> Response:
    if stream:
        events = call.stream()
        # The first event is made here, so that a refusal is a status and not a broken stream.
        first = await anext(events)
        return StreamingResponse(_after(first, events), media_type="text/event-stream")
    return JSONResponse(await _while_connected(call.whole(), request))


async def _after(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for each in events:
            yield each
    finally:
        await events.aclose()  # type: ignore[attr-defined]


async def _while_connected(work: Awaitable[Any], request: Request) -> Any:
    """The result of ``work``, which ends when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client went away")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, QuantPageError, ValueError):
                await each


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_model(served: Served, name: str | None) -> None:
    if name not in (None, served.name):
        message = f"model: expected {served.name!r}, got {name!r}"
        raise HTTPException(404, {"message": message, "param": "model", "code": "model_not_found"})


def _errors(app: FastAPI) -> None:
    def answer(
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        # What came may be no text, and the answer has to be.
        message = message.encode("utf-8", "replace").decode()
        param = None if param is None else param.encode("utf-8", "replace").decode()
        error = {"message": message, "type": kind, "param": param, "code": code}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return JSONResponse({"error": error}, status, named)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "none")
        # So it is sent by `curl -d`; a page of elsewhere may send it too, without being asked.
        if isinstance(error.body, bytes) and error.body and "json" not in kind:
            return answer(415, f"Content-Type: expected application/json, got {kind}")
        where, message = first_problem(error.errors())
        return answer(400, f"{where or 'body'}: {message}", where or None)

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        headers, path = dict(error.headers or {}), request.url.path
        if isinstance(error.detail, dict):
            return answer(error.status_code, **error.detail, **headers)
        message = str(error.detail)
        if error.status_code == 404 and message == "Not Found":
            message = f"{path}: no such path here; /openapi.json lists those that are"
        if error.status_code == 405:
            message = f"{path}: expected {headers.get('Allow', 'another')}, got {request.method}"
        return answer(error.status_code, message, **headers)

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> JSONResponse:
        message = str(error)
        return answer(400, message, message.partition(":")[0], getattr(error, "code", None))

    @app.exception_handler(QueueFull)
    async def full(_: Request, error: QueueFull) -> JSONResponse:
        return answer(429, str(error), retry_after=_RETRY_AFTER)

    @app.exception_handler(EngineStopped)
    async def stopped(_: Request, error: EngineStopped) -> JSONResponse:
        return answer(503, str(error), retry_after=_RETRY_AFTER)

    @app.exception_handler(QuantPageError)
    async def failed(_: Request, error: QuantPageError) -> JSONResponse:
        return answer(500, str(error))
