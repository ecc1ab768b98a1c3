"""The HTTP API: OpenAI's, for a package's base model and each of its adapters."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from serve import about
from serve.adapters import BASE
from serve.answers import Answer
from serve.engine import Engine, Ongoing
from serve.errors import ApiError
from serve.gate import Gate
from serve.metrics import Metrics
from serve.requests import (
    ChatRequest,
    CompletionRequest,
    LoadAdapter,
    Message,
    Sampling,
    TextPart,
    UnloadAdapter,
)

log = logging.getLogger("olivepress.serve")


FIELDS = {
    name
    for kind in (ChatRequest, CompletionRequest, Message, TextPart, LoadAdapter, UnloadAdapter)
    for name in kind.model_fields
}


@dataclass
class Prompted:
    """The prompts of a request as tokens, and how many tokens each answer may have."""

    prompts: list[list[int]]
    most: list[int]
    told: int | None
    """Alternatives of each token that are told; None for no probabilities."""


def create_app(engine: Engine, key: str | None = None, hosts: set[str] | None = None) -> FastAPI:
    """The application for an engine, which it stops when it ends.

    Args:
        key: that requests must bring as `Authorization: Bearer KEY`; None for none.
        hosts: names under which it may be asked; None for any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.scheduler.stop)

    # No pages of documentation: they would fetch their scripts from another host.
    app = FastAPI(title="Olivepress", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, key=key, hosts=hosts)
    scheduler = engine.scheduler
    metrics = Metrics(
        lambda: scheduler.running,
        lambda: scheduler.waiting,
        lambda: len(engine.adapters.loaded()),
    )
    _errors(app)
    _answers(app, engine, metrics)
    about.adapters(app, engine)
    about.about(app, engine, metrics)
    return app


def _errors(app: FastAPI) -> None:
    """Every error in the API's shape."""

    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        message = error.detail
        if error.status_code == 404:
            message = f"There is nothing at {request.url.path[:200]}"
        elif error.status_code == 405:
            message = f"{request.method} is not possible at {request.url.path[:200]}"
        headers = dict(error.headers or {})
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers)

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            refused = ApiError(400, "The body is not JSON: " + str(first["ctx"]["error"]))
        else:
            # Without the names of the forms that a value may have.
            loc = [part for part in first["loc"][1:] if isinstance(part, int) or part in FIELDS]
            param = ".".join(str(part) for part in loc) or "the body"
            refused = ApiError(400, f"{param}: {first['msg']}", param[:100], "invalid_value")
        return JSONResponse(refused.body(), refused.status)


def _answers(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    text = engine.text

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: Request) -> Response:
        async def prompted() -> Prompted:
            messages = [each.as_template() for each in body.messages]
            said = await asyncio.to_thread(text.conversation, messages, body.model != BASE)
            ids = await asyncio.to_thread(text.encode, said, False)
            most = engine.check(ids, body.max_completion_tokens or body.max_tokens, "messages")
            told = (body.top_logprobs or 0) if body.logprobs else None
            return Prompted([ids], [most], told)

        return await _answered(engine, metrics, body, prompted, http, chat=True)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        async def prompted() -> Prompted:
            prompts = await asyncio.to_thread(_tokens, engine, body.prompt)
            asked = 16 if body.max_tokens is None else body.max_tokens  # the API's default
            most = [engine.check(ids, asked, "prompt") for ids in prompts]
            return Prompted(prompts, most, body.logprobs)

        return await _answered(engine, metrics, body, prompted, http, chat=False)


def _tokens(engine: Engine, prompt: Any) -> list[list[int]]:
    """The prompts of a request for completions, each as tokens."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt:
        raise ApiError(400, "prompt: is empty", "prompt")
    found = []
    for each in prompt:
        ids = engine.text.encode(each, True) if isinstance(each, str) else each
        if any(not 0 <= token < engine.batch.vocabulary for token in ids):
            raise ApiError(400, f"prompt: tokens are 0 to {engine.batch.vocabulary - 1}", "prompt")
        found.append(ids)
    return found


async def _answered(
    engine: Engine,
    metrics: Metrics,
    body: Sampling,
    prompted: Callable[[], Any],
    http: Request,
    *,
    chat: bool,
) -> Response:
    """The response to a request, whole or as a stream; counted either way."""
    started = time.monotonic()
    model = "unknown"
    try:
        adapter = await engine.adapter(body.model)
        model = body.model
        wanted = await prompted()
        ongoing = engine.begin(body, wanted.prompts, adapter, wanted.most, wanted.told)
    except ApiError as error:
        metrics.requests.labels(model, error.status).inc()
        raise
    used = sum(len(ids) for ids in wanted.prompts)
    choices = body.n * len(wanted.prompts)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    answer = Answer(body.model, chat, engine.text, used, choices, wanted.told is not None, usage)
    counted = _counted(ongoing, answer, metrics, started)
    if body.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            _closing(answer.stream(counted), ongoing), 200, headers, "text/event-stream"
        )
    whole = asyncio.ensure_future(answer.whole(counted))
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            raise ApiError(499, "The client went away")
        return JSONResponse(whole.result())
    finally:
        gone.cancel()
        whole.cancel()
        ongoing.close()


async def _closing(stream: AsyncIterator[bytes], ongoing: Ongoing) -> AsyncIterator[bytes]:
    """The stream; whoever stops reading it frees the slots."""
    try:
        async for part in stream:
            yield part
    finally:
        ongoing.close()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _counted(
    ongoing: Ongoing, answer: Answer, metrics: Metrics, started: float
) -> AsyncIterator[Any]:
    """The pieces, with what the metrics and the log say of them."""
    first, status = True, 499  # the client went away
    try:
        async for piece in ongoing:
            if first:
                metrics.first_token.observe(time.monotonic() - started)
                first = False
            status = 500 if piece.error else status
            yield piece
        status = 500 if status == 500 else 200
    finally:
        seconds = time.monotonic() - started
        metrics.duration.observe(seconds)
        metrics.requests.labels(answer.model, status).inc()
        metrics.prompt_tokens.labels(answer.model).inc(answer.prompt_tokens)
        metrics.generated_tokens.labels(answer.model).inc(sum(answer.made))
        log.info(
            "%s %s: %d + %d tokens in %.2f s", answer.model, status, answer.prompt_tokens,
            sum(answer.made), seconds,
        )  # fmt: skip
