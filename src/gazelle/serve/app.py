"""The application: OpenAI's endpoints, health, metrics and feedback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from gazelle import __version__
from gazelle.serve.answers import Answer
from gazelle.serve.errors import ApiError, refused
from gazelle.serve.forms import ChatForm, CompletionForm
from gazelle.serve.gate import Gate, failure
from gazelle.serve.keys import Keys
from gazelle.serve.schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorAnswer,
    Feedback,
    FeedbackTaken,
    Health,
    Model,
    ModelList,
)
from gazelle.serve.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": what} for status, what in (
        (400, "The request cannot be answered as it is"), (401, "No valid API key"), (404, "No such model or answer"),
        (413, "Too large"), (415, "No JSON"), (421, "Called by another name"), (429, "At capacity; see Retry-After"),
        (500, "The server failed"), (503, "Shutting down, or out of time"))}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_bearer = HTTPBearer(auto_error=False, description="An API key, where the server asks for one.")


def create_app(service: Service, keys: Keys | None = None) -> Gate:
    """The ASGI application of a server.

    Args:
        service: its models and worker.
        keys: None asks for none.
    """
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="gazelle", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  redirect_slashes=False, dependencies=[Security(_bearer)], responses=_ERRORS,
                  description="Models that gazelle trained, as OpenAI's API.")
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_such)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(Exception, _failed)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Go on with a conversation."""
        return _answer(body, request, ChatForm)

    @app.post("/v1/completions", response_model=Completion, responses=_STREAM)
    async def completion(body: CompletionRequest, request: Request) -> Response:
        """Go on with a text."""
        return _answer(body, request, CompletionForm)

    def _answer(body: ChatRequest | CompletionRequest, request: Request, form: type[Any]) -> Response:
        model = service.model(body.model)
        request.state.model = model.name
        body.check_served()
        return Answer(service, model, form(body, model))

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[_model(name) for name in service.models])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        """One of them."""
        return _model(service.model(name).name)

    def _model(name: str) -> Model:
        served = service.models[name]
        return Model(id=name, created=served.created, root=served.parent or name, parent=served.parent,
                     max_model_len=served.context)

    @app.post("/v1/feedback")
    async def feedback(body: Feedback, request: Request) -> FeedbackTaken:
        """Say what a reader thought of an answer, once, with the key that asked for it."""
        service.rate(body.id, request.state.key, body.rating)
        return FeedbackTaken(id=body.id, rating=body.rating)

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether requests are taken."""
        status = service.status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await asyncio.to_thread(service.metrics.text), media_type=CONTENT_TYPE_LATEST)

    return Gate(app, service.settings, keys, service.metrics)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 — for the type checker: it is registered for these
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return _json(refused("The body is no valid JSON.", code="invalid_json"))
    if first["type"] == "extra_forbidden":
        return _json(refused(f"There is no field {where!r} here.", where, "unknown_parameter"))
    return _json(refused(f"{where or 'body'}: {first['msg']}.", where or None))


async def _no_such(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 — as above
    known = {404: ("There is nothing at this address.", "not_found"),
             405: ("This address does not take that method.", "method_not_allowed")}
    message, code = known.get(error.status_code, (str(error.detail), "invalid_value"))
    return _json(ApiError(error.status_code, message, code, headers=error.headers))


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 — as above
    return _json(error)


async def _failed(_: Request, error: Exception) -> Response:  # noqa: ARG001 — the gate logs it
    return _json(failure())


def _json(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)
