"""The routes: OpenAI's API, and what whoever runs the server wants to know."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pixtral_runtime.inputs.openai_chat import FieldError
from pixtral_runtime.server.batches_api import batch_routes
from pixtral_runtime.server.chat_reply import ChatReply
from pixtral_runtime.server.http import Guard, RequestLog, problem_response
from pixtral_runtime.server.metrics import CONTENT_TYPE
from pixtral_runtime.server.page import page_routes
from pixtral_runtime.server.preparation import Prepared
from pixtral_runtime.server.problems import Problem, problem_of
from pixtral_runtime.server.responses_reply import ResponsesReply
from pixtral_runtime.server.responses_request import chat_body
from pixtral_runtime.server.service import Service
from pixtral_runtime.version import __version__


def make_app(service: Service, keys: Sequence[str] = (), *, is_loopback: bool = True) -> Starlette:
    """The application that answers for a service. Where there are `keys`, clients must have one."""
    routes = _Routes(service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    return Starlette(
        routes=[
            *page_routes(),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/responses", routes.responses, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            *batch_routes(service),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/version", routes.version),
            Route("/metrics", routes.metrics),
        ],
        middleware=[Middleware(RequestLog), Middleware(Guard, keys=tuple(keys), is_loopback=is_loopback)],
        exception_handlers={HTTPException: _no_route},
        lifespan=lifespan,
    )


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem_response(Problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        service = self._service

        def reply_of(request_id: str, prepared: Prepared) -> ChatReply:
            return ChatReply(f"chatcmpl-{request_id}", service.name, service.model.prompts, prepared)

        return await service.answer(request, await service.body(request), reply_of)

    async def responses(self, request: Request) -> Response:
        service = self._service
        body = await service.body(request)
        try:
            chat = chat_body(body)
        except FieldError as error:
            raise problem_of(error) from error

        def reply_of(request_id: str, prepared: Prepared) -> ResponsesReply:
            return ResponsesReply(f"resp_{request_id}", service.name, service.model.prompts, prepared, body)

        return await service.answer(request, chat, reply_of)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._service.name:
            raise Problem(404, f"the model here is {self._service.name!r}", field="model", code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.name,
            "object": "model",
            "created": service.created_s,
            "owned_by": "pixtral",
            "max_model_len": service.loop.scheduler.context,
        }

    async def tokenize(self, request: Request) -> Response:
        service = self._service
        tokens = await service.preparation.tokens(await service.body(request))
        context = service.loop.scheduler.context
        return JSONResponse({"count": len(tokens), "max_model_len": context, "tokens": tokens})

    async def health(self, request: Request) -> Response:
        """Whether this process can still answer; if not, another one should be started."""
        return _state(["the model has failed"] if not self._service.loop.is_alive else [])

    async def ready(self, request: Request) -> Response:
        """Whether to send requests here."""
        service = self._service
        reasons = [] if service.loop.is_alive else ["the model has failed"]
        reasons += ["the server is stopping"] if service.is_stopping else []
        reasons += ["the queue is full"] if service.places.is_full else []
        return _state(reasons)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)


def _state(reasons: Iterable[str]) -> Response:
    reasons = list(reasons)
    return JSONResponse({"status": "; ".join(reasons) or "ok"}, 503 if reasons else 200)
