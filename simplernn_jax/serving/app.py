"""The HTTP application: routes, limits, and streams of server-sent events."""

import asyncio
import contextlib
import importlib.resources
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from absl import logging
from msgspec import UNSET
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from simplernn_jax.serving.choice_text import Piece
from simplernn_jax.serving.openapi import openapi_document
from simplernn_jax.serving.requests import (
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
from simplernn_jax.serving.responses import ChatCompletion, Completion, error_body, usage
from simplernn_jax.serving.service import RETRY_AFTER_SECONDS, Answer, Service
from simplernn_jax.serving.states import NamedState

MAX_BODY_BYTES = 1 << 24
PAGE = importlib.resources.files("simplernn_jax.serving") / "page"
BODY_SECONDS = 30.0
"""Seconds within which the body of a request must arrive."""

Handler = Callable[[Request], Awaitable[Response]]


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Encode `content` as JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(error: RequestError) -> Response:
    """Make the response to a request that cannot be answered."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status in (429, 503) else None
    body = error_body(error.message, error.status, error.param, error.code)
    return json_response(body, error.status, headers)


async def read_body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
      RequestError: 413 if it is too long, 408 if it does not arrive.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise RequestError(f"the body has over {MAX_BODY_BYTES:,} bytes", status=413)
                parts.append(part)
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time", status=408) from error
    return b"".join(parts)


def make_app(service: Service) -> Starlette:
    """Make the application."""

    def checked(handler: Handler) -> Handler:
        """Turn errors of a request into responses, and count them."""

        async def wrapped(request: Request) -> Response:
            try:
                response = await handler(request)
            except RequestError as error:
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except Exception:
                logging.exception("%s %s failed", request.method, request.url.path)
                response = error_response(RequestError("the server failed", status=500))
            path = request.scope["route"].path
            service.metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return wrapped

    async def completions(request: Request) -> Response:
        service.check_room()
        body = parse(CompletionRequest, await read_body(request))
        answer = service.complete(body, await started_from(body.state))
        return await respond(request, Completion(service), body, answer, body.logprobs is not None)

    async def chat(request: Request) -> Response:
        service.check_room()
        body = parse(ChatRequest, await read_body(request))
        answer = service.chat(body, await started_from(body.state))
        return await respond(request, ChatCompletion(service), body, answer, bool(body.logprobs))

    async def started_from(name: str | None) -> NamedState | None:
        return None if name is None else await asyncio.to_thread(service.states.load, name)

    async def respond(
        request: Request,
        form: Completion,
        body: SamplingFields,
        answer: Answer,
        has_logprobs: bool,
    ) -> Response:
        check_model(body.model)
        # The first step decides whether the request is counted, and refuses it with its own status.
        updates = answer.updates()
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            answer.submit()
            frames = stream(form, answer, updates, has_logprobs, with_usage)
            return StreamingResponse(
                frames, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        answer.submit()
        gathered = asyncio.ensure_future(gather(answer, updates))
        gone = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait({gathered, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not gathered.done():
                raise ClientDisconnect
            pieces = gathered.result()
        finally:
            answer.cancel()
            for task in (gathered, gone):
                task.cancel()
        choices = [form.choice(i, piece, has_logprobs) for i, piece in enumerate(pieces)]
        return json_response(form.response(choices, usage(answer.results)))

    def check_model(name: str | None) -> None:
        if name not in (None, service.model_name):
            raise RequestError(
                f"model: {name!r} is not served here; {service.model_name!r} is",
                param="model",
                status=404,
                code="model_not_found",
            )

    async def models(request: Request) -> Response:
        del request
        model = {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "simplernn_jax",
        }
        return json_response({"object": "list", "data": [model]})

    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeRequest, await read_body(request))
        check_model(body.model)
        ids = service.encode(body.prompt).tolist()
        if body.add_special_tokens:
            ids = [service.tokenizer.bos_id, *ids]
        names = [service.names.names[i] for i in ids] if body.return_token_strs else None
        return json_response({"count": len(ids), "tokens": ids, "token_strs": names})

    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeRequest, await read_body(request))
        check_model(body.model)
        service.check_ids("tokens", body.tokens)
        return json_response({"prompt": service.tokenizer.decode(body.tokens)})

    async def tokenizer_info(request: Request) -> Response:
        del request
        tokenizer = service.tokenizer
        return json_response(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": tokenizer.vocab_size,
                # They have ids, but no text that stands for them.
                **dict.fromkeys(("bos_token", "eos_token", "pad_token")),
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eos_id,
                "pad_token_id": tokenizer.pad_id,
                "chat_template": service.template and service.template.source,
            }
        )

    async def list_states(request: Request) -> Response:
        def described() -> list[Any]:
            states = []
            for name in service.states.names():
                with contextlib.suppress(RequestError):  # corrupted, deleted or of another model
                    states.append(service.describe_state(service.states.load(name)))
            return states

        del request
        return json_response({"object": "list", "data": await asyncio.to_thread(described)})

    async def make_state(request: Request) -> Response:
        body = parse(StateRequest, await read_body(request))
        parent = await started_from(body.parent)
        answer = service.prefill_state(body, parent)
        answer.submit()
        try:
            root = (await answer.prefilled()).root
            assert root is not None
        finally:
            answer.cancel()
        name = None if body.name is UNSET else body.name
        tokens = answer.results[0].job.tokens
        state = await asyncio.to_thread(service.states.add, name, root, tokens, parent)
        return json_response(service.describe_state(state), 201)

    async def show_state(request: Request) -> Response:
        state = await asyncio.to_thread(service.states.load, request.path_params["name"])
        return json_response(service.describe_state(state))

    async def state_file(request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "PUT":
            content = await read_body(request)
            state = await asyncio.to_thread(service.states.put, name, content)
            return json_response(service.describe_state(state), 201)
        content = await asyncio.to_thread(service.states.read, name)
        headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
        return Response(content, 200, headers, "application/octet-stream")

    async def fork_state(request: Request) -> Response:
        body = parse(ForkRequest, await read_body(request) or b"{}")
        name = None if body.name is UNSET else body.name
        state = await asyncio.to_thread(service.states.fork, request.path_params["name"], name)
        return json_response(service.describe_state(state), 201)

    async def delete_state(request: Request) -> Response:
        name = request.path_params["name"]
        await asyncio.to_thread(service.states.delete, name)
        return json_response({"id": name, "object": "state", "deleted": True})

    async def metrics(request: Request) -> Response:
        del request
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def slots(request: Request) -> Response:
        del request
        engine = service.engine
        return json_response(
            {
                "slots": engine.num_slots,
                "active": engine.num_active,
                "waiting": engine.num_waiting,
                "max_waiting": engine.max_waiting,
            }
        )

    async def health(request: Request) -> Response:
        del request
        status = service.status
        return json_response({"status": status}, 200 if status == "ready" else 503)

    async def openapi(request: Request) -> Response:
        del request
        return json_response(openapi_document(service.model_name))

    async def reload(request: Request) -> Response:
        del request
        return json_response({"reloaded": await service.reload()})

    routes = [
        *(Route(path, page_file) for path in ("/", "/page.js", "/page.css")),
        Route("/openapi.json", openapi),
        Route("/admin/reload", checked(reload), methods=["POST"]),
        Route("/v1/completions", checked(completions), methods=["POST"]),
        Route("/v1/chat/completions", checked(chat), methods=["POST"]),
        Route("/v1/models", checked(models)),
        Route("/tokenize", checked(tokenize), methods=["POST"]),
        Route("/detokenize", checked(detokenize), methods=["POST"]),
        Route("/tokenizer_info", checked(tokenizer_info)),
        Route("/v1/states", checked(list_states)),
        Route("/v1/states", checked(make_state), methods=["POST"]),
        Route("/v1/states/{name}", checked(show_state)),
        Route("/v1/states/{name}", checked(delete_state), methods=["DELETE"]),
        Route("/v1/states/{name}/file", checked(state_file), methods=["GET", "PUT"]),
        Route("/v1/states/{name}/fork", checked(fork_state), methods=["POST"]),
        Route("/metrics", metrics),
        Route("/slots", checked(slots)),
        Route("/health", checked(health)),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: http_exception})
    app.router.redirect_slashes = False
    return app


async def page_file(request: Request) -> Response:
    """Serve a file of the page."""
    name = request.url.path.lstrip("/") or "index.html"
    content = await asyncio.to_thread((PAGE / name).read_bytes)
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
    policy = {
        "Content-Security-Policy": (
            "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(content, 200, policy, kinds[name.rpartition(".")[2]] + "; charset=utf-8")


async def http_exception(request: Request, error: Exception) -> Response:
    """Make the response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return json_response(error_body(message, error.status_code), error.status_code, error.headers)


async def disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def gather(answer: Answer, updates: AsyncIterator[Any]) -> list[Piece]:
    """Collect the whole pieces of all choices."""
    pieces = [
        Piece(result.prompt_text, [], None)
        for result in answer.results
        for _ in range(result.job.num_choices)
    ]
    async for several in updates:
        for update in several:
            piece = pieces[update.index]
            piece.text += update.piece.text
            piece.entries += update.piece.entries
            piece.finish_reason = update.piece.finish_reason
    number = 0
    for result in answer.results:
        for _ in range(result.job.num_choices):
            pieces[number].entries[:0] = result.prompt_entries or []
            number += 1
    return pieces


async def stream(
    form: Completion,
    answer: Answer,
    updates: AsyncIterator[Any],
    has_logprobs: bool,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """Yield the frames of a stream: one for each choice and step."""
    more = {"usage": None} if with_usage else {}
    started: set[int] = set()
    try:
        async for several in updates:
            for update in several:
                piece, is_first = update.piece, update.index not in started
                if is_first:
                    result = answer.results[update.index // answer.results[0].job.num_choices]
                    piece.text = result.prompt_text + piece.text
                    piece.entries[:0] = result.prompt_entries or []
                if piece.text or piece.entries or piece.finish_reason or is_first:
                    started.add(update.index)
                    choice = form.delta(update.index, piece, has_logprobs, is_first)
                    yield sse_frame(form.frame([choice], **more))
        if with_usage:
            yield sse_frame(form.frame([], usage=usage(answer.results)))
        yield b"data: [DONE]\n\n"
    except RequestError as error:
        yield sse_frame(error_body(error.message, error.status, error.param, error.code))
    finally:
        answer.cancel()


def sse_frame(content: Any) -> bytes:
    """Encode one server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"
