"""The API's document tells of every route, and answers are what it says they are."""

import re

import httpx
import jsonschema
import pytest
from starlette.responses import JSONResponse
from starlette.routing import Route

from pipeline.gateway.http.api_route import ApiRoute
from pipeline.gateway.http.app import build_app
from pipeline.gateway.http.openapi import ApiDocument
from pipeline.gateway.http.page import HEADERS, page_routes
from pipeline.gateway.http.stego import stego_routes
from pipeline.gateway.openai_requests import ChatRequest, CompletionRequest
from tests.pipeline.gateway.conftest import MODEL
from tests.pipeline.gateway.http.openai_calls import KEY, USER

AUTH = {"authorization": f"Bearer {KEY}"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'


async def other(_):
    """What somebody else's route does. Raises ApiError."""
    return JSONResponse({})


@pytest.fixture
def app(make_desk):
    desk = make_desk()
    more = [*stego_routes(desk, lambda: None), Route("/other/{id}", other, methods=["POST"])]
    return build_app(desk, desk.metrics, metrics=object(), more=more, page=page_routes())


def resolved(document, schema):
    return {**schema, "components": document["components"]}


async def test_every_route_that_is_no_page_is_told_of(app):
    pages = {route.path for route in page_routes()} | {"/docs", "/docs/style.css", "/openapi.json"}
    routes = [route for route in app.routes if route.path not in pages]
    document = ApiDocument(routes).document
    told = {(path, method.upper()) for path, each in document["paths"].items() for method in each}
    assert told == {
        (route.path.replace(":path", ""), method)
        for route in routes
        for method in route.methods - {"HEAD"}
    }
    assert document["paths"]["/other/{id}"]["post"]["summary"] == "What somebody else's route does."
    assert all(each.answer for each in routes if isinstance(each, ApiRoute) if "/v1/" in each.path)


async def test_schemas_are_those_that_endpoints_parse_with(app):
    document = ApiDocument(app.routes).document
    for model in (ChatRequest, CompletionRequest):
        assert set(document["components"]["schemas"][model.__name__]["properties"]) == set(
            model.model_fields
        )
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(resolved(document, schema))


@pytest.mark.parametrize("has_page", [False, True])
async def test_anybody_may_read_it_and_it_asks_no_other_host(start_gateway, has_page):
    page = page_routes() if has_page else ()
    async with start_gateway(page=page) as gateway, httpx.AsyncClient() as client:
        document = await client.get(f"{gateway.url}/openapi.json")
        shown = await client.get(f"{gateway.url}/docs")
        style = await client.get(f"{gateway.url}/docs/style.css")
        assert (await client.get(f"{gateway.url}/version")).status_code == 401
    for answer in (document, shown, style):
        assert answer.status_code == 200
        assert HEADERS.items() <= answer.headers.items()
    assert document.json()["openapi"] == "3.1.0"
    for path in document.json()["paths"]:
        assert f" {path}</code>" in shown.text
    assert not re.search(r"<script|style=|https?:|url\(|@import", shown.text + style.text)


CHAT = {"messages": USER, "max_tokens": 5}
TEXT = {"prompt": "Hi", "max_tokens": 5}
ASKED = [
    ("get", "/livez", None),
    ("get", "/health", None),
    ("get", "/version", None),
    ("get", "/v1/models", None),
    ("get", f"/v1/models/{MODEL}", None),
    ("get", "/v1/models/none", None),
    ("get", "/tokenizer_info", None),
    ("post", "/tokenize", {"prompt": "Hi", "return_token_strs": True}),
    ("post", "/tokenize", {"messages": USER}),
    ("post", "/tokenize", {"unheard_of": 1}),
    ("post", "/detokenize", {"tokens": [1, 2]}),
    ("post", "/v1/chat/completions", CHAT),
    ("post", "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "n": 2}),
    ("post", "/v1/chat/completions", CHAT | {"tools": TOOLS, "max_tokens": 200}),
    ("post", "/v1/chat/completions", {"unheard_of": 1}),
    ("post", "/v1/completions", TEXT),
    ("post", "/v1/completions", TEXT | {"logprobs": 3, "echo": False, "stop": "l"}),
    ("post", "/v1/completions", {"unheard_of": 1}),
    ("post", "/v1/embeddings", {"unheard_of": 1}),
]


@pytest.mark.parametrize(("method", "path", "body"), ASKED, ids=str)
async def test_an_answer_is_what_the_document_says(start_gateway, make_engine, method, path, body):
    engine = make_engine(text=f"Hello {CALL}")
    async with start_gateway(engine) as gateway, httpx.AsyncClient(headers=AUTH) as client:
        document = (await client.get(f"{gateway.url}/openapi.json")).json()
        answer = await client.request(method, f"{gateway.url}{path}", json=body)
    template = "/v1/models/{model}" if path.startswith("/v1/models/") else path
    responses = document["paths"][template][method]["responses"]
    status = "200" if answer.status_code == 200 else f"{answer.status_code // 100}XX"
    content = responses[status]["content"]
    schema = content[answer.headers["content-type"]]["schema"]
    jsonschema.validate(answer.json(), resolved(document, schema))
    if body is not None and answer.status_code == 200:
        told = document["paths"][template][method]["requestBody"]["content"]
        jsonschema.validate(body, resolved(document, told["application/json"]["schema"]))
