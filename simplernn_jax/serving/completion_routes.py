"""Routes of completions and chat completions, whole or as server-sent events."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from simplernn_jax.serving.answers import Answer, Update, in_thread_if_long
from simplernn_jax.serving.choice_text import Piece
from simplernn_jax.serving.http import (
    EventStream,
    counted,
    json_response,
    read_json,
    unless_disconnected,
)
from simplernn_jax.serving.requests import (
    ChatRequest,
    CompletionRequest,
    RequestError,
    SamplingFields,
)
from simplernn_jax.serving.responses import ChatCompletion, Completion, error_body, usage
from simplernn_jax.serving.service import Service


def completion_routes(service: Service) -> list[Route]:
    """Make the routes of completions."""

    async def completions(request: Request) -> Response:
        return await respond(request, CompletionRequest, service.complete, Completion)

    async def chat(request: Request) -> Response:
        return await respond(request, ChatRequest, service.chat, ChatCompletion)

    async def respond(
        request: Request,
        body_of: type[SamplingFields],
        make_answer: Callable[..., Answer],
        form_of: type[Completion],
    ) -> Response:
        service.check_room()
        async with read_json(request, body_of) as (body, size):
            service.check_model(body.model)
            start = await service.load_state(body.state)
            size *= body.n or 1
            answer = await service.make_answer(make_answer, body, start, size)
        form = form_of(service)
        has_logprobs = answer.results[0].choices[0].num_logprobs is not None
        answer.submit()  # or refuses with a status, which a stream could not
        updates = answer.updates()
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            frames = stream(form, answer, updates, has_logprobs, with_usage)
            return EventStream(
                frames, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        try:
            pieces = await unless_disconnected(request.receive, gather(answer, updates))
        finally:
            answer.cancel()

        def make() -> Response:
            choices = [form.choice(i, piece, has_logprobs) for i, piece in enumerate(pieces)]
            return json_response(form.response(choices, usage(answer.results)))

        size = sum(len(piece.entries) + len(piece.text) // 16 for piece in pieces)
        return await in_thread_if_long(size, make)

    return [
        Route("/v1/completions", counted(service, completions), methods=["POST"]),
        Route("/v1/chat/completions", counted(service, chat), methods=["POST"]),
    ]


async def gather(answer: Answer, updates: AsyncIterator[Any]) -> list[Piece]:
    """Collect the whole pieces of all choices."""
    results = [result for result in answer.results for _ in range(result.job.num_choices)]
    pieces = [Piece(result.prompt_text, [], None) for result in results]
    async for several in updates:
        for update in several:
            piece = pieces[update.index]
            piece.text += update.piece.text
            piece.entries += update.piece.entries
            piece.finish_reason = update.piece.finish_reason
    for result, piece in zip(results, pieces, strict=True):
        piece.entries[:0] = result.prompt_entries or []
    return pieces


async def stream(
    form: Completion,
    answer: Answer,
    updates: AsyncIterator[Any],
    has_logprobs: bool,
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """Yield the frames of a stream, one for each event of a choice, and several together."""
    more = {"usage": None} if with_usage else {}
    started: set[int] = set()
    try:
        async for several in updates:
            frames: list[bytes] = []
            for update in several:
                piece, is_first = update.piece, update.index not in started
                if is_first:
                    result = answer.results[update.index // answer.results[0].job.num_choices]
                    piece.text = result.prompt_text + piece.text
                    piece.entries = [*(result.prompt_entries or []), *piece.entries]
                if piece.text or piece.entries or piece.finish_reason or is_first:
                    started.add(update.index)

                    def make(update: Update = update, is_first: bool = is_first) -> bytes:
                        choice = form.delta(update.index, update.piece, has_logprobs, is_first)
                        return sse_frame(form.frame([choice], **more))

                    frames.append(await in_thread_if_long(len(piece.entries), make))
            if answer.is_complete:
                if with_usage:
                    frames.append(sse_frame(form.frame([], usage=usage(answer.results))))
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
