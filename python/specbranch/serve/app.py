"""The endpoints."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from specbranch.core.checks import shown
from specbranch.serve import requests
from specbranch.serve.answers import Answer, Answers, Event, Left, Piece
from specbranch.serve.logprobs import TokenTexts
from specbranch.serve.refusal import Refusal, refusal_of
from specbranch.serve.replies import DONE, ChatReply, CompletionReply, Reply, encoded, sent
from specbranch.serve.requests import Asked

MOST_BYTES = 16 * 2**20  # of a request's body
CLIENT_LEFT = 499  # as nginx has it; nobody reads it
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Endpoint:
    path: str
    read: Callable[[object], Asked]
    reply: type[Reply]


ENDPOINTS = (
    Endpoint("/v1/chat/completions", requests.chat, ChatReply),
    Endpoint("/v1/completions", requests.completion, CompletionReply),
)


class Service:
    """name: of the model, as requests have it. log: is told of each request in a line, when it is over."""

    def __init__(self, answers: Answers, name: str, log: Callable[[str], None]) -> None:
        self.answers, self.name, self.log = answers, name, log
        self.created = int(time.time())
        self.texts: TokenTexts | None = None

    @property
    def app(self) -> Starlette:
        routes = [
            *(Route(each.path, partial(self.answer, each), methods=["POST"]) for each in ENDPOINTS),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _not_here, Exception: _faulty})

    async def health(self, request: Request) -> Response:
        queue = self.answers.queue
        status = "shutting down" if queue.closed else "ok"
        found = {"status": status, "running": queue.running, "waiting": queue.waiting}
        return _json(found, 503 if queue.closed else 200)

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        try:
            self._check_name(request.path_params["name"])
        except Refusal as refusal:
            return _refused(refusal)
        return _json(self._model())

    def _model(self) -> dict[str, object]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "specbranch"}

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"the model {shown(name)} does not exist; this server has {self.name!r}"
            raise Refusal(404, message, param="model", code="model_not_found")

    async def answer(self, endpoint: Endpoint, request: Request) -> Response:
        try:
            asked = endpoint.read(await _read_json(request))
            self._check_name(asked.model)
            answer = self.answers.begin(asked, endpoint.path, partial(_left, request))
        except Refusal as refusal:
            self.log(f"{endpoint.path}: {refusal.status}, {refusal}")
            return _refused(refusal)
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        event = await answer.event()
        if asked.stream and not isinstance(event, Exception):
            chunks = _chunks(self._reply(endpoint, answer), event, answer)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=STREAM_HEADERS)
        pieces = []
        while isinstance(event, Piece):
            pieces.append(event)
            event = await answer.event()
        if isinstance(event, Left):
            return Response(status_code=CLIENT_LEFT)
        if isinstance(event, Exception):
            return _refused(refusal_of(event))
        return _json(self._reply(endpoint, answer).whole(pieces, event))

    def _reply(self, endpoint: Endpoint, answer: Answer) -> Reply:
        tokenizer = self.answers.engine.tokenizer
        if self.texts is None and tokenizer is not None:
            self.texts = TokenTexts(tokenizer)
        texts = None if answer.asked.logprobs is None else self.texts
        return endpoint.reply(answer.asked, self.name, answer.prompt_tokens, texts)


async def _chunks(reply: Reply, event: Event, answer: Answer) -> AsyncIterator[bytes]:
    """A stream's events. An error in its middle is an event too, and the last one."""
    try:
        for chunk in reply.first():
            yield sent(chunk)
        while isinstance(event, Piece):
            yield sent(reply.chunk(event))
            event = await answer.event()
        if isinstance(event, Exception):
            yield sent(refusal_of(event).body)
            return
        for chunk in reply.last(event):
            yield sent(chunk)
        yield DONE
    finally:
        answer.leave()


async def _read_json(request: Request) -> object:
    """The body. Raises Refusal for what is no JSON, or said to be none, and for more than MOST_BYTES."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":  # which a page of another site cannot send
        raise Refusal(415, f"Content-Type is {shown(kind)}; expected application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refusal(413, f"the body has more than {MOST_BYTES} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None


async def _left(request: Request) -> None:
    """Returns when the client is gone, or has its answer."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: object, status: int = 200) -> Response:
    return Response(encoded(value), status, media_type="application/json")


def _refused(refusal: Refusal) -> Response:
    return _json(refusal.body, refusal.status)


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refused(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


async def _faulty(request: Request, error: Exception) -> Response:
    return _refused(refusal_of(error))
