"""Routes of named states."""

import asyncio

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from simplernn_jax.serving.http import (
    counted,
    json_response,
    read_body,
    read_json,
    unless_disconnected,
)
from simplernn_jax.serving.requests import ForkRequest, RequestError, StateRequest, parse
from simplernn_jax.serving.service import Service


def state_routes(service: Service) -> list[Route]:
    """Make the routes below ``/v1/states``."""
    listing = asyncio.Lock()  # a list reads every file: several at a time would take all threads

    async def list_states(request: Request) -> Response:
        def described() -> Response:
            states = []
            for name in service.states.names():
                try:
                    states.append(service.describe_state(service.states.load(name)))
                except RequestError as error:  # corrupted, deleted or of another model
                    if error.status == 503:
                        raise
            return json_response({"object": "list", "data": states})

        async with listing:
            return await asyncio.to_thread(described)

    async def make_state(request: Request) -> Response:
        async with read_json(request, StateRequest) as (body, size):
            parent = await service.load_state(body.parent)
            answer = await service.make_answer(service.prefill_state, body, parent, size)
        states = service.states  # a reload replaces them together with the parameters
        answer.submit()
        try:
            root = (await unless_disconnected(request.receive, answer.prefilled())).root
            assert root is not None
        finally:
            answer.cancel()
        name = None if body.name is UNSET else body.name
        tokens = answer.results[0].job.tokens
        state = await asyncio.to_thread(states.add, name, root, tokens, parent)
        return json_response(service.describe_state(state), 201)

    async def show_state(request: Request) -> Response:
        state = await asyncio.to_thread(service.states.load, request.path_params["name"])
        return json_response(service.describe_state(state))

    async def state_file(request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "PUT":
            async with read_body(request) as content:
                state = await asyncio.to_thread(service.states.put, name, content)
            return json_response(service.describe_state(state), 201)
        content = await asyncio.to_thread(service.states.read, name)
        headers = {"Content-Disposition": f'attachment; filename="{name}.safetensors"'}
        return Response(content, 200, headers, "application/octet-stream")

    async def fork_state(request: Request) -> Response:
        async with read_body(request) as content:
            body = parse(ForkRequest, content or b"{}")
        name = None if body.name is UNSET else body.name
        state = await asyncio.to_thread(service.states.fork, request.path_params["name"], name)
        return json_response(service.describe_state(state), 201)

    async def delete_state(request: Request) -> Response:
        name = request.path_params["name"]
        await asyncio.to_thread(service.states.delete, name)
        return json_response({"id": name, "object": "state", "deleted": True})

    return [
        Route("/v1/states", counted(service, list_states)),
        Route("/v1/states", counted(service, make_state), methods=["POST"]),
        Route("/v1/states/{name}", counted(service, show_state)),
        Route("/v1/states/{name}", counted(service, delete_state), methods=["DELETE"]),
        Route("/v1/states/{name}/file", counted(service, state_file), methods=["GET", "PUT"]),
        Route("/v1/states/{name}/fork", counted(service, fork_state), methods=["POST"]),
    ]
