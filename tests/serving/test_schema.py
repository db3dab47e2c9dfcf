"""Random requests, valid and not, from the OpenAPI document that the server publishes."""

import hypothesis
import pytest

from simplernn_jax.serving.app import openapi_document

schemathesis = pytest.importorskip("schemathesis", reason="Schemathesis is not installed")


pytestmark = pytest.mark.slow

schema = schemathesis.openapi.from_dict(openapi_document("chat"))
OPERATIONS = {found.ok().label: found.ok() for found in schema.get_all_operations()}


# Not `schema.parametrize`: its tests share one id, and pytest-xdist runs one test of an id.
@pytest.mark.parametrize("operation", OPERATIONS)
@hypothesis.given(data=hypothesis.strategies.data())
@hypothesis.settings(max_examples=12, deadline=None)
def test_no_request_is_a_server_error(data, operation, server):
    case = data.draw(OPERATIONS[operation].as_strategy())
    for name in ("max_tokens", "max_completion_tokens"):  # or an answer may take hours
        if isinstance(case.body, dict) and isinstance(case.body.get(name), int):
            case.body[name] = min(case.body[name], 20)
    response = case.call(base_url=server.url, timeout=60)
    case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])
    if 400 <= response.status_code < 500 and case.path.startswith("/v1"):
        assert response.json()["error"]["message"]
    assert server.send("GET", "/health")[0] == 200
