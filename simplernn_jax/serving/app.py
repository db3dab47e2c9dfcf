"""The HTTP application: the page, and the operations of the API with their OpenAPI document."""

import asyncio
import importlib.resources
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from absl import logging
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import simplernn_jax
from simplernn_jax.serving.http import EventStream, read_body, read_json, unless_disconnected
from simplernn_jax.serving.requests import (
    NAME_PATTERN,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ForkRequest,
    RequestError,
    SamplingFields,
    StateRequest,
    TokenizeRequest,
    parse,
)
from simplernn_jax.serving.responses import (
    ChatCompletion,
    Completion,
    error_body,
    excerpt,
    json_response,
)
from simplernn_jax.serving.service import Answer, Service, Update, in_thread_if_long

RETRY_AFTER_SECONDS = 1

PAGE = importlib.resources.files("simplernn_jax.serving") / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in ("page", "tokens")},
    "/page.css": ("page.css", "text/css"),
}
"""Name and media type of the page's files by path."""
PAGE_CONTENT = {path: (PAGE / name).read_bytes() for path, (name, _) in PAGE_FILES.items()}
"""Content of the files, which another installation may replace while the server runs."""
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

Handler = Callable[[Any, Request], Awaitable[Response]]


class Operation(NamedTuple):
    """A method of `Api` that answers requests."""

    method: str
    path: str
    body: Any
    """Type of the request's body, ``bytes`` or None."""
    status: int
    """Status of a success."""
    handler: Handler


OPERATIONS: list[Operation] = []


def operation(
    method: str, path: str, body: Any = None, status: int = 200
) -> Callable[[Handler], Handler]:
    """Make a method of `Api` an operation; its docstring describes it in the OpenAPI document."""

    def add(handler: Handler) -> Handler:
        OPERATIONS.append(Operation(method, path, body, status, handler))
        return handler

    return add


def make_app(service: Service) -> Starlette:
    """Make the application."""
    api = Api(service)
    routes = [Route(path, page_file) for path in PAGE_FILES]
    routes += [Route(one.path, api.endpoint(one), methods=[one.method]) for one in OPERATIONS]
    routes.append(Route("/openapi.json", api.openapi))
    app = Starlette(routes=routes, exception_handlers={HTTPException: http_exception})
    app.router.redirect_slashes = False
    app.state.body_bytes = 0
    return app


async def page_file(request: Request) -> Response:
    """Serve a file of the page."""
    path = request.scope["path"]
    media_type = f"{PAGE_FILES[path][1]}; charset=utf-8"
    return Response(PAGE_CONTENT[path], 200, PAGE_HEADERS, media_type)


async def http_exception(request: Request, error: Exception) -> Response:
    """Make the response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return json_response(error_body(message, error.status_code), error.status_code, error.headers)


class Api:
    """The operations of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # A list of states reads every file: several at a time would take all threads.
        self._listing = asyncio.Lock()

    def endpoint(self, one: Operation) -> Callable[[Request], Awaitable[Response]]:
        """Bind an operation; its errors become responses, and all responses are counted."""

        async def respond(request: Request) -> Response:
            try:
                response = await one.handler(self, request)
            except RequestError as error:
                response = _error_response(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except Exception:
                logging.exception("%s %r failed", one.method, excerpt(request.scope["path"]))
                response = _error_response(RequestError("the server failed", status=500))
            counter = self._service.metrics.requests.labels(one.path, str(response.status_code))
            counter.inc()
            return response

        return respond

    @operation("POST", "/v1/completions", CompletionRequest)
    async def completions(self, request: Request) -> Response:
        """Continue texts or token ids."""
        make = self._service.complete
        return await self._complete(request, CompletionRequest, make, Completion)

    @operation("POST", "/v1/chat/completions", ChatRequest)
    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._complete(request, ChatRequest, self._service.chat, ChatCompletion)

    async def _complete(
        self,
        request: Request,
        kind: type[SamplingFields],
        make_answer: Callable[..., Answer],
        form_of: type[Completion],
    ) -> Response:
        service = self._service
        service.check_room()
        async with read_json(request, kind) as (body, size):
            service.check_model(body.model)
            size *= body.n or 1
            answer, _ = await service.make_answer(make_answer, body, body.state, size)
        form = form_of(service.model_name, service.names)
        has_logprobs = answer.results[0].choices[0].num_logprobs is not None
        answer.submit()  # raises what has a status, before a stream begins
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            frames = stream(form, answer, has_logprobs, with_usage)
            return EventStream(
                frames, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        try:
            pieces = await unless_disconnected(request.receive, answer.pieces())
        finally:
            answer.cancel()

        def encode() -> Response:
            choices = [form.choice(i, piece, has_logprobs) for i, piece in enumerate(pieces)]
            return json_response(form.response(choices, answer.usage))

        size = sum(len(piece.entries) + len(piece.text) // 16 for piece in pieces)
        return await in_thread_if_long(size, encode)

    @property
    def _model(self) -> Any:
        name, created = self._service.model_name, self._service.created
        return {"id": name, "object": "model", "created": created, "owned_by": "simplernn_jax"}

    @operation("GET", "/v1/models")
    async def models(self, request: Request) -> Response:
        """List the model."""
        return json_response({"object": "list", "data": [self._model]})

    @operation("GET", "/v1/models/{name:path}")
    async def model(self, request: Request) -> Response:
        """Describe the model."""
        self._service.check_model(request.path_params["name"])
        return json_response(self._model)

    @operation("POST", "/tokenize", TokenizeRequest)
    async def tokenize(self, request: Request) -> Response:
        """Encode a text."""
        service = self._service

        def encoded(body: TokenizeRequest) -> Response:
            ids = service.inputs.encode(body.prompt).tolist()
            if body.add_special_tokens:
                ids = [service.tokenizer.bos_id, *ids]
            names = [service.names.names[i] for i in ids] if body.return_token_strs else None
            return json_response({"count": len(ids), "tokens": ids, "token_strs": names})

        async with read_json(request, TokenizeRequest) as (body, size):
            service.check_model(body.model)
            return await in_thread_if_long(size, encoded, body)

    @operation("POST", "/detokenize", DetokenizeRequest)
    async def detokenize(self, request: Request) -> Response:
        """Decode token ids."""
        service = self._service

        def decoded(body: DetokenizeRequest) -> Response:
            service.inputs.check_ids("tokens", body.tokens)
            return json_response({"prompt": service.tokenizer.decode(body.tokens)})

        async with read_json(request, DetokenizeRequest) as (body, size):
            service.check_model(body.model)
            return await in_thread_if_long(size, decoded, body)

    @operation("GET", "/tokenizer_info")
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

    @operation("GET", "/v1/states")
    async def list_states(self, request: Request) -> Response:
        """List the named states."""
        service = self._service

        def described() -> Response:
            states = []
            for name in service.states.names():
                try:
                    states.append(service.describe_state(service.states.load(name)))
                except RequestError as error:  # corrupt, deleted or of another model
                    if error.status == 503:
                        raise
            return json_response({"object": "list", "data": states})

        async with self._listing:
            return await asyncio.to_thread(described)

    @operation("POST", "/v1/states", StateRequest, 201)
    async def make_state(self, request: Request) -> Response:
        """Prefill a text once and name its state."""
        service = self._service
        async with read_json(request, StateRequest) as (body, size):
            make = service.prefill_state
            answer, parent = await service.make_answer(make, body, body.parent, size)
        states = service.states  # a reload replaces them together with the parameters
        answer.submit()
        try:
            prefilled = await unless_disconnected(request.receive, answer.prefilled())
            assert prefilled.state is not None
        finally:
            answer.cancel()
        name = None if body.name is UNSET else body.name
        tokens = answer.results[0].job.tokens
        state = await asyncio.to_thread(states.add, name, prefilled.state, tokens, parent)
        return json_response(service.describe_state(state), 201)

    @operation("GET", "/v1/states/{name}")
    async def show_state(self, request: Request) -> Response:
        """Describe a state."""
        state = await asyncio.to_thread(self._service.states.load, request.path_params["name"])
        return json_response(self._service.describe_state(state))

    @operation("DELETE", "/v1/states/{name}")
    async def delete_state(self, request: Request) -> Response:
        """Delete a state."""
        name = request.path_params["name"]
        await asyncio.to_thread(self._service.states.delete, name)
        return json_response({"id": name, "object": "state", "deleted": True})

    @operation("GET", "/v1/states/{name}/file")
    async def download_state(self, request: Request) -> Response:
        """Download a state."""
        name = request.path_params["name"]
        content = await asyncio.to_thread(self._service.states.read, name)
        headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
        return Response(content, 200, headers, "application/octet-stream")

    @operation("PUT", "/v1/states/{name}/file", bytes, 201)
    async def upload_state(self, request: Request) -> Response:
        """Upload a state."""
        name = request.path_params["name"]
        async with read_body(request) as content:
            state = await asyncio.to_thread(self._service.states.put, name, content)
        return json_response(self._service.describe_state(state), 201)

    @operation("POST", "/v1/states/{name}/fork", ForkRequest, 201)
    async def fork_state(self, request: Request) -> Response:
        """Copy a state."""
        async with read_body(request) as content:
            body = parse(ForkRequest, content or b"{}")
        name, states = None if body.name is UNSET else body.name, self._service.states
        state = await asyncio.to_thread(states.fork, request.path_params["name"], name)
        return json_response(self._service.describe_state(state), 201)

    @operation("GET", "/health")
    async def health(self, request: Request) -> Response:
        """200 once requests are answered, 503 before and while ending."""
        status = self._service.status
        return json_response({"status": status}, 200 if status == "ready" else 503)

    @operation("GET", "/slots")
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

    @operation("GET", "/metrics")
    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    @operation("POST", "/admin/reload")
    async def reload(self, request: Request) -> Response:
        """Load the checkpoint that is selected now."""
        return json_response({"reloaded": await self._service.reload()})

    async def openapi(self, request: Request) -> Response:
        """Serve the OpenAPI document."""
        return json_response(openapi_document(self._service.model_name))


def _error_response(error: RequestError) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status in (429, 503) else None
    body = error_body(error.message, error.status, error.param, error.code)
    return json_response(body, error.status, headers)


async def stream(
    form: Completion, answer: Answer, has_logprobs: bool, with_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the frames of a stream, one for each event of a choice, several at a time."""
    more = {"usage": None} if with_usage else {}
    started: set[int] = set()

    def frame(update: Update, is_first: bool) -> bytes:
        choice = form.delta(*update, has_logprobs, is_first)
        return sse_frame(form.frame([choice], **more))

    try:
        async for updates in answer.updates():
            frames: list[bytes] = []
            for index, piece in updates:
                is_first = index not in started
                if is_first:
                    result = answer.results[index // answer.results[0].job.num_choices]
                    piece.text = result.prompt_text + piece.text
                    piece.entries = [*(result.prompt_entries or []), *piece.entries]
                if piece.text or piece.entries or piece.finish_reason or is_first:
                    started.add(index)
                    size = len(piece.entries)
                    frames.append(await in_thread_if_long(size, frame, (index, piece), is_first))
            if answer.is_complete:
                if with_usage:
                    frames.append(sse_frame(form.frame([], usage=answer.usage)))
                frames.append(b"data: [DONE]\n\n")
            if frames:
                yield b"".join(frames)
    except RequestError as error:
        yield sse_frame(error_body(error.message, error.status, error.param, error.code))
    finally:
        answer.cancel()


def sse_frame(content: Any) -> bytes:
    """Encode one server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def openapi_document(model_name: str) -> Any:
    """Describe all operations, from the types of their requests."""
    kinds = [one.body for one in OPERATIONS if one.body not in (None, bytes)]
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    of_kind = dict(zip(kinds, schemas, strict=True))
    error = {"description": "OpenAI's error object", "content": {"application/json": {}}}
    paths: dict[str, Any] = {}
    for method, path, kind, status, handler in OPERATIONS:
        described: dict[str, Any] = {
            "summary": handler.__doc__,
            "responses": {
                str(status): {"description": "Success"},
                **dict.fromkeys(("4XX", "503", "507"), error),
            },
        }
        if kind is not None:
            content = {"application/octet-stream": {"schema": {"type": "string"}}}
            if kind is not bytes:
                content = {"application/json": {"schema": of_kind[kind]}}
            described["requestBody"] = {"required": True, "content": content}
        path = path.replace(":path", "")
        schema = {"type": "string"} | ({"pattern": NAME_PATTERN} if "states" in path else {})
        name = {"name": "name", "in": "path", "required": True, "schema": schema}
        paths.setdefault(path, {"parameters": [name]} if "{name}" in path else {})
        paths[path][method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": f"simplernn_jax: {model_name}", "version": simplernn_jax.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }
