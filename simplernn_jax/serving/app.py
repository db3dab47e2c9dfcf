"""The HTTP application: all routes, and the page."""

import asyncio
import importlib.resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from simplernn_jax.serving.answers import in_thread_if_long
from simplernn_jax.serving.completion_routes import completion_routes
from simplernn_jax.serving.http import counted, http_exception, json_response, read_body
from simplernn_jax.serving.openapi import openapi_document
from simplernn_jax.serving.requests import DetokenizeRequest, TokenizeRequest, parse
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.state_routes import state_routes

PAGE = importlib.resources.files("simplernn_jax.serving") / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in ("page", "tokens")},
    "/page.css": ("page.css", "text/css"),
}
"""Name and media type of the page's files by path."""


def make_app(service: Service) -> Starlette:
    """Make the application."""
    routes = [
        *(Route(path, page_file) for path in PAGE_FILES),
        *completion_routes(service),
        *state_routes(service),
        *tokenizer_routes(service),
        *operation_routes(service),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: http_exception})
    app.router.redirect_slashes = False
    return app


def tokenizer_routes(service: Service) -> list[Route]:
    """Make the routes of the model and its tokenizer."""

    description = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "simplernn_jax",
    }

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [description]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return json_response(description)

    async def tokenize(request: Request) -> Response:
        body = parse(TokenizeRequest, await read_body(request))
        service.check_model(body.model)
        size = len(body.prompt)
        ids = (await in_thread_if_long(size, service.inputs.encode, body.prompt)).tolist()
        if body.add_special_tokens:
            ids = [service.tokenizer.bos_id, *ids]
        names = [service.names.names[i] for i in ids] if body.return_token_strs else None
        return json_response({"count": len(ids), "tokens": ids, "token_strs": names})

    async def detokenize(request: Request) -> Response:
        body = parse(DetokenizeRequest, await read_body(request))
        service.check_model(body.model)
        service.inputs.check_ids("tokens", body.tokens)
        ids = body.tokens
        text = await in_thread_if_long(len(ids), service.tokenizer.decode, ids)
        return json_response({"prompt": text})

    async def tokenizer_info(request: Request) -> Response:
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

    return [
        Route("/v1/models", counted(service, models)),
        Route("/v1/models/{name:path}", counted(service, model)),
        Route("/tokenize", counted(service, tokenize), methods=["POST"]),
        Route("/detokenize", counted(service, detokenize), methods=["POST"]),
        Route("/tokenizer_info", counted(service, tokenizer_info)),
    ]


def operation_routes(service: Service) -> list[Route]:
    """Make the routes for those who run the server."""

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def slots(request: Request) -> Response:
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
        status = service.status
        return json_response({"status": status}, 200 if status == "ready" else 503)

    async def openapi(request: Request) -> Response:
        return json_response(openapi_document(service.model_name))

    async def reload(request: Request) -> Response:
        return json_response({"reloaded": await service.reload()})

    return [
        Route("/openapi.json", openapi),
        Route("/admin/reload", counted(service, reload), methods=["POST"]),
        Route("/metrics", metrics),
        Route("/slots", counted(service, slots)),
        Route("/health", counted(service, health)),
    ]


async def page_file(request: Request) -> Response:
    """Serve a file of the page."""
    name, kind = PAGE_FILES[request.scope["path"]]
    content = await asyncio.to_thread((PAGE / name).read_bytes)
    policy = {
        "Content-Security-Policy": (
            "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(content, 200, policy, f"{kind}; charset=utf-8")
