"""The HTTP application: all routes, and the page."""

import importlib.resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from simplernn_jax.serving.answers import in_thread_if_long
from simplernn_jax.serving.completion_routes import completion_routes
from simplernn_jax.serving.http import counted, http_exception, json_response, read_json
from simplernn_jax.serving.openapi import openapi_document
from simplernn_jax.serving.requests import DetokenizeRequest, TokenizeRequest
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.state_routes import state_routes

PAGE = importlib.resources.files("simplernn_jax.serving") / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in ("page", "tokens")},
    "/page.css": ("page.css", "text/css"),
}
"""Name and media type of the page's files by path."""
PAGE_CONTENT = {path: (PAGE / name).read_bytes() for path, (name, _) in PAGE_FILES.items()}
"""Content of the files, which another installation may replace while the server runs."""


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
    app.state.body_bytes = 0
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
        def encoded(body: TokenizeRequest) -> Response:
            ids = service.inputs.encode(body.prompt).tolist()
            if body.add_special_tokens:
                ids = [service.tokenizer.bos_id, *ids]
            names = [service.names.names[i] for i in ids] if body.return_token_strs else None
            return json_response({"count": len(ids), "tokens": ids, "token_strs": names})

        async with read_json(request, TokenizeRequest) as (body, size):
            service.check_model(body.model)
            return await in_thread_if_long(size, encoded, body)

    async def detokenize(request: Request) -> Response:
        def decoded(body: DetokenizeRequest) -> Response:
            service.inputs.check_ids("tokens", body.tokens)
            return json_response({"prompt": service.tokenizer.decode(body.tokens)})

        async with read_json(request, DetokenizeRequest) as (body, size):
            service.check_model(body.model)
            return await in_thread_if_long(size, decoded, body)

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
    path = request.scope["path"]
    policy = {
        "Content-Security-Policy": (
            "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(PAGE_CONTENT[path], 200, policy, f"{PAGE_FILES[path][1]}; charset=utf-8")
