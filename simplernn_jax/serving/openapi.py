"""The OpenAPI document of the server, from the types of its requests."""

from typing import Any

import msgspec

import simplernn_jax
from simplernn_jax.serving.requests import (
    NAME_PATTERN,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ForkRequest,
    StateRequest,
    TokenizeRequest,
)

_OPERATIONS: tuple[tuple[str, str, str, type | None, int], ...] = (
    ("post", "/v1/completions", "Continue texts or token ids.", CompletionRequest, 200),
    ("post", "/v1/chat/completions", "Answer a conversation.", ChatRequest, 200),
    ("get", "/v1/models", "List the model.", None, 200),
    ("get", "/v1/models/{name}", "Describe the model.", None, 200),
    ("post", "/tokenize", "Encode a text.", TokenizeRequest, 200),
    ("post", "/detokenize", "Decode token ids.", DetokenizeRequest, 200),
    ("get", "/tokenizer_info", "Describe the tokenizer.", None, 200),
    ("get", "/v1/states", "List the named states.", None, 200),
    ("post", "/v1/states", "Prefill a text once and name its state.", StateRequest, 201),
    ("get", "/v1/states/{name}", "Describe a state.", None, 200),
    ("delete", "/v1/states/{name}", "Delete a state.", None, 200),
    ("get", "/v1/states/{name}/file", "Download a state.", None, 200),
    ("put", "/v1/states/{name}/file", "Upload a state.", bytes, 201),
    ("post", "/v1/states/{name}/fork", "Copy a state.", ForkRequest, 201),
    ("get", "/health", "200 once requests are answered, 503 before and while ending.", None, 200),
    ("get", "/slots", "Count slots and waiting prompts.", None, 200),
    ("get", "/metrics", "Prometheus metrics.", None, 200),
    ("post", "/admin/reload", "Load the checkpoint that is selected now.", None, 200),
)


def openapi_document(model_name: str) -> Any:
    """Describe all operations."""
    kinds = [kind for *_, kind, _ in _OPERATIONS if kind not in (None, bytes)]
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    of_kind = dict(zip(kinds, schemas, strict=True))
    error = {"description": "OpenAI's error object", "content": {"application/json": {}}}
    paths: dict[str, Any] = {}
    for method, path, summary, kind, status in _OPERATIONS:
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": {
                str(status): {"description": "Success"},
                **dict.fromkeys(("4XX", "503", "507"), error),
            },
        }
        if kind is bytes:
            content = {"application/octet-stream": {"schema": {"type": "string"}}}
            operation["requestBody"] = {"required": True, "content": content}
        elif kind is not None:
            content = {"application/json": {"schema": of_kind[kind]}}
            operation["requestBody"] = {"required": True, "content": content}
        schema = {"type": "string"} | ({"pattern": NAME_PATTERN} if "states" in path else {})
        name = {"name": "name", "in": "path", "required": True, "schema": schema}
        paths.setdefault(path, {"parameters": [name]} if "{name}" in path else {})
        paths[path][method] = operation
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
