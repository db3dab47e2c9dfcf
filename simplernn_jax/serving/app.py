"""The HTTP application: the page, and the operations of the API."""

import asyncio
import contextlib
import importlib.resources
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from absl import logging
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from simplernn_jax.serving.answers import Answer, ChatCompletion, Completion, Piece, infill_body
from simplernn_jax.serving.http import (
    error_object,
    error_response,
    excerpt,
    json_response,
    read_body,
    unless_disconnected,
)
from simplernn_jax.serving.requests import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    RequestError,
    StateRequest,
)
from simplernn_jax.serving.service import Service

PAGE = importlib.resources.files("simplernn_jax.serving") / "page"
PAGE_FILES = ("index.html", "page.js", "server.js", "page.css")
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
LONG = 4096
"""Tokens whose JSON takes some ten milliseconds: a thread makes it, while others are answered."""


def make_app(service: Service) -> Starlette:
    """Make the application."""
    api = Api(service)
    routes = [Route(f"/{name}".removesuffix("index.html"), page_file(name)) for name in PAGE_FILES]
    routes += [
        Route(path, api.endpoint(path, handler), methods=[method])
        for method, path, handler in OPERATIONS
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: http_exception})
    app.router.redirect_slashes = False
    return app


def page_file(name: str) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint of a file, which another installation may replace meanwhile."""
    content, (media_type, _) = (PAGE / name).read_bytes(), mimetypes.guess_type(name)

    async def respond(request: Request) -> Response:
        return Response(content, 200, PAGE_HEADERS, f"{media_type}; charset=utf-8")

    return respond


async def http_exception(request: Request, error: Exception) -> Response:
    """Make the response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return error_response(RequestError(message, status=error.status_code), error.headers)


class Api:
    """The operations of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def endpoint(self, path: str, handler: "Handler") -> Callable[[Request], Awaitable[Response]]:
        """Bind an operation; its errors become responses, and all responses are counted."""

        async def respond(request: Request) -> Response:
            try:
                response = await handler(self, request)
            except RequestError as error:
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except Exception:
                logging.exception("%s %r failed", request.method, excerpt(request.scope["path"]))
                response = error_response(RequestError("the server failed", status=500))
            self._service.worker.metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return respond

    async def _submit(self, request: Request, kind: type[AnyRequest]) -> tuple[AnyRequest, Answer]:
        """Read the body of a request and submit its jobs; raises what has a status."""
        self._service.check_room()
        async with read_body(request) as content:
            body, answer = await self._service.answer(kind, content)
        answer.submit()
        return body, answer

    async def completions(self, request: Request) -> Response:
        """Continue texts or token ids."""
        return await self._complete(request, CompletionRequest, Completion)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._complete(request, ChatRequest, ChatCompletion)

    async def infill(self, request: Request) -> Response:
        """Fill in the text between a prefix and a suffix."""
        body, answer = await self._submit(request, InfillRequest)
        (piece,) = await unless_disconnected(request.receive, answer.pieces())
        response = json_response(infill_body(body, self._service.model_name, piece.text, answer))
        (job,) = answer.jobs
        if job.infill is not None and job.infill.is_full and job.max_tokens:
            response.background = BackgroundTask(self._prefill_ahead, body)
        return response

    async def _prefill_ahead(self, body: InfillRequest) -> None:
        """Prefill the prompt with one more character, which begins differently."""
        ahead = msgspec.structs.replace(body, prompt=body.prompt + " ", n_predict=0)
        with contextlib.suppress(RequestError):
            _, answer = await self._service.answer(InfillRequest, msgspec.json.encode(ahead))
            answer.submit()
            await answer.pieces()

    async def _complete(
        self,
        request: Request,
        kind: type[CompletionRequest] | type[ChatRequest],
        form_of: type[Completion],
    ) -> Response:
        body, answer = await self._submit(request, kind)
        form = form_of(body, self._service.model_name, self._service.names)
        if body.stream:
            return StreamingResponse(
                stream(form, answer),
                headers={"Cache-Control": "no-cache"},
                media_type="text/event-stream",
                background=BackgroundTask(answer.cancel),  # also if the stream never begins
            )
        pieces = await unless_disconnected(request.receive, answer.pieces())
        return await asyncio.to_thread(lambda: json_response(form.response(pieces, answer)))

    @property
    def _model(self) -> Any:
        name, created = self._service.model_name, self._service.created
        return {"id": name, "object": "model", "created": created, "owned_by": "simplernn_jax"}

    async def models(self, request: Request) -> Response:
        """List the model."""
        return json_response({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        self._service.check_model(request.path_params["name"])
        return json_response(self._model)

    async def tokenize(self, request: Request) -> Response:
        """Encode a text."""
        async with read_body(request) as content:
            response = await asyncio.to_thread(self._service.tokenize, content)
        return response

    async def detokenize(self, request: Request) -> Response:
        """Decode token ids."""
        async with read_body(request) as content:
            response = await asyncio.to_thread(self._service.detokenize, content)
        return response

    async def tokenizer_info(self, request: Request) -> Response:
        """Describe the tokenizer."""
        tokenizer, template = self._service.tokenizer, self._service.template
        return json_response(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": tokenizer.vocab_size,
                # They have ids, but no text that stands for them.
                **dict.fromkeys(("bos_token", "eos_token", "pad_token")),
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
                "chat_template": template and template.source,
            }
        )

    async def list_states(self, request: Request) -> Response:
        """List the named states."""
        states = await asyncio.to_thread(self._service.states.descriptions)
        return json_response({"object": "list", "data": states})

    async def make_state(self, request: Request) -> Response:
        """Prefill a text once and name its state."""
        body, answer = await self._submit(request, StateRequest)
        states = self._service.states  # a reload replaces them together with the parameters
        await unless_disconnected(request.receive, answer.pieces())
        (job,) = answer.jobs
        assert answer.state is not None
        state = await asyncio.to_thread(states.add, body.name, answer.state, job)
        return json_response(state.description, 201)

    async def show_state(self, request: Request) -> Response:
        """Describe a state."""
        name = request.path_params["name"]
        state = await asyncio.to_thread(self._service.states.load, name)
        return json_response(state.description)

    async def delete_state(self, request: Request) -> Response:
        """Delete a state."""
        name = request.path_params["name"]
        await asyncio.to_thread(self._service.states.delete, name)
        return json_response({"id": name, "object": "state", "deleted": True})

    async def download_state(self, request: Request) -> Response:
        """Download a state."""
        name = request.path_params["name"]
        content = await asyncio.to_thread(self._service.states.read, name)
        headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
        return Response(content, 200, headers, "application/octet-stream")

    async def upload_state(self, request: Request) -> Response:
        """Upload a state."""
        states, name = self._service.states, request.path_params["name"]
        async with read_body(request) as content:
            state = await asyncio.to_thread(states.put, name, content)
        return json_response(state.description, 201)

    async def health(self, request: Request) -> Response:
        """200 once requests are answered, 503 before and while ending."""
        status = self._service.status
        return json_response({"status": status}, 200 if status == "ready" else 503)

    async def slots(self, request: Request) -> Response:
        """Count slots and waiting prompts."""
        worker = self._service.worker
        return json_response(
            {
                "slots": worker.num_slots,
                "active": worker.num_active,
                "waiting": worker.num_waiting,
                "max_waiting": worker.max_waiting,
            }
        )

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        return Response(self._service.worker.metrics.text(), media_type="text/plain; version=0.0.4")

    async def reload(self, request: Request) -> Response:
        """Load the checkpoint that is selected now."""
        return json_response({"reloaded": await self._service.reload()})


Handler = Callable[[Api, Request], Awaitable[Response]]
OPERATIONS: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/completions", Api.completions),
    ("POST", "/v1/chat/completions", Api.chat),
    ("POST", "/infill", Api.infill),
    ("GET", "/v1/models", Api.models),
    ("GET", "/v1/models/{name:path}", Api.model),
    ("POST", "/tokenize", Api.tokenize),
    ("POST", "/detokenize", Api.detokenize),
    ("GET", "/tokenizer_info", Api.tokenizer_info),
    ("GET", "/v1/states", Api.list_states),
    ("POST", "/v1/states", Api.make_state),
    ("GET", "/v1/states/{name}", Api.show_state),
    ("DELETE", "/v1/states/{name}", Api.delete_state),
    ("GET", "/v1/states/{name}/file", Api.download_state),
    ("PUT", "/v1/states/{name}/file", Api.upload_state),
    ("GET", "/health", Api.health),
    ("GET", "/slots", Api.slots),
    ("GET", "/metrics", Api.metrics),
    ("POST", "/admin/reload", Api.reload),
]
"""Method, path and handler of all operations."""


async def stream(form: Completion, answer: Answer) -> AsyncIterator[bytes]:
    """Yield the frames of a stream, one for each event of a choice, several at a time."""
    started: set[int] = set()

    def frame(index: int, piece: Piece) -> bytes:
        return sse_frame(form.frame(index, piece, index not in started))

    try:
        async for updates in answer.updates():
            frames = []
            for index, piece in updates:
                if piece.text or piece.entries or piece.finish_reason or index not in started:
                    if len(piece.entries) > LONG:
                        frames.append(await asyncio.to_thread(frame, index, piece))
                    else:
                        frames.append(frame(index, piece))
                    started.add(index)
            if frames:
                yield b"".join(frames)
        yield b"".join(map(sse_frame, form.last_frames(answer))) + b"data: [DONE]\n\n"
    except RequestError as error:
        yield sse_frame(error_object(error))
    finally:
        answer.cancel()


def sse_frame(content: Any) -> bytes:
    """Encode one server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
