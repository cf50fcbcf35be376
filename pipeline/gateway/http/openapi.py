"""What the API is, told by its own routes: `/openapi.json` for programs, `/docs` for people.

Both are made once, of the table of routes and of the schemas that endpoints parse with. The page is
static: no script, nothing of any other host. Neither holds anything of anybody's, and so neither
wants a key.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.gateway.http.answer_schemas import ErrorAnswer
from pipeline.gateway.http.api_route import ApiRoute
from pipeline.gateway.http.page import HEADERS

_REF = "#/components/schemas/{model}"
_JSON = "application/json"
EVENTS = "text/event-stream"
_OBJECT = {"type": "object"}
# Of each event its data: JSON, or [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STYLE = """body { font: 1rem/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem }
h2 { border-top: 1px solid #8888; font-size: 1.1rem; margin-top: 2rem; padding-top: 1rem }
code { font-family: ui-monospace, monospace }
table { border-collapse: collapse }
td { border-top: 1px solid #8884; padding: .2rem 1rem .2rem 0; vertical-align: top }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } a { color: #8bf } }
"""


def docs_routes(routes: Sequence[Route]) -> Sequence[Route]:
    """What tells of these routes; anybody may read it."""
    api = ApiDocument(routes)

    async def document(_: Request) -> Response:
        return JSONResponse(api.document, headers=HEADERS)

    async def page(_: Request) -> Response:
        return Response(api.page, headers=HEADERS, media_type="text/html; charset=utf-8")

    async def style(_: Request) -> Response:
        return Response(_STYLE, headers=HEADERS, media_type="text/css; charset=utf-8")

    return Route("/openapi.json", document), Route("/docs", page), Route("/docs/style.css", style)


class ApiDocument:
    """OpenAPI 3.1, and a page of the same."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """As JSON."""
        models: set[type[BaseModel]] = {ErrorAnswer}
        for route in self._routes:
            if isinstance(route, ApiRoute):
                models |= {each for each in (route.body, route.answer, route.error) if each}
        ordered = sorted(models, key=lambda model: model.__name__)
        _, found = models_json_schema([(each, "validation") for each in ordered], ref_template=_REF)
        paths: dict[str, dict[str, Any]] = {}
        for route in self._routes:
            path = re.sub(r":\w+}", "}", route.path)
            for method in sorted((route.methods or set()) - {"HEAD"}):
                paths.setdefault(path, {})[method.lower()] = _operation(route, path, method)
        return {
            "openapi": "3.1.0",
            "info": {"title": "veilpipe", "version": version("veilpipe")},
            "paths": paths,
            "components": {
                "schemas": found["$defs"],
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }

    @cached_property
    def page(self) -> str:
        """As HTML."""
        document = self.document
        schemas = document["components"]["schemas"]
        parts = [
            "<!doctype html><html lang=en><meta charset=utf-8><title>veilpipe's API</title>",
            '<meta name=viewport content="width=device-width">',
            '<link rel=stylesheet href="/docs/style.css"><h1>The API</h1>',
            '<p>The same for programs: <a href="/openapi.json">/openapi.json</a></p>',
        ]
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
                parts.append(f"<p>{escape(operation['summary'])}</p>")
                parts += _fields("Body", _body_of(operation), schemas)
                parts += _fields("Answer", _answer_of(operation), schemas)
        return "\n".join(parts)


def _operation(route: Route, path: str, method: str) -> dict[str, Any]:
    """What one method of a route does; of a plain route only what its endpoint's docstring says."""
    told = route if isinstance(route, ApiRoute) else None
    said = " ".join((route.endpoint.__doc__ or "").split())
    error = ErrorAnswer if told is None else told.error
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub(r'[^a-zA-Z0-9]+', '_', path)}",
        "summary": said.partition(" Raises ")[0] or path,
        "security": [] if told is not None and told.is_open else [{"key": []}],
        "responses": {
            "200": {"description": "The answer.", "content": _answers(route)},
            "4XX": {"description": "The request cannot be served.", "content": _json(error)},
            "5XX": {"description": "It cannot be served now.", "content": _failure(told)},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in route.param_convertors
    ]
    if parameters:
        operation["parameters"] = parameters
    if method == "POST":
        content = _json(None if told is None else told.body)
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _failure(told: ApiRoute | None) -> dict[str, Any]:
    """Probes answer as ever where nothing can be computed."""
    content = _json(ErrorAnswer if told is None else told.error)
    if told is not None and told.is_open:
        content[_JSON]["schema"] = {
            "anyOf": [each[_JSON]["schema"] for each in (content, _json(told.answer))]
        }
    return content


def _answers(route: Route) -> dict[str, Any]:
    if not isinstance(route, ApiRoute):
        return _json(None)
    if route.answer is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    content = _json(route.answer)
    if route.streams is not None:
        content[route.streams] = {"schema": _EVENT}
    return content


def _json(model: type[BaseModel] | None) -> dict[str, Any]:
    named = _OBJECT if model is None else {"$ref": _REF.format(model=model.__name__)}
    return {_JSON: {"schema": named}}


def _body_of(operation: Mapping[str, Any]) -> Mapping[str, Any]:
    content: Mapping[str, Any] = operation.get("requestBody", {}).get("content", {})
    return content


def _answer_of(operation: Mapping[str, Any]) -> Mapping[str, Any]:
    content: Mapping[str, Any] = operation["responses"]["200"]["content"]
    return content


def _fields(
    title: str, content: Mapping[str, Any], schemas: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    name = str(content.get(_JSON, {}).get("schema", {}).get("$ref", "")).rpartition("/")[2]
    schema = schemas.get(name)
    if schema is None:
        return
    yield f"<h3>{title}</h3><p>{escape(str(schema.get('description', '')))}</p><table>"
    required = schema.get("required", ())
    for field, told in schema.get("properties", {}).items():
        mark = " (required)" if field in required else ""
        yield f"<tr><td><code>{escape(field)}</code>{mark}<td><code>{escape(_kind(told))}</code>"
    yield "</table>"


def _kind(told: Mapping[str, Any]) -> str:
    """A field's type, in a few words."""
    if "anyOf" in told:
        return " | ".join(_kind(each) for each in told["anyOf"])
    if "$ref" in told:
        return str(told["$ref"]).rpartition("/")[2]
    if "const" in told or "enum" in told:
        return " | ".join(f'"{each}"' for each in told.get("enum", [told.get("const")]))
    kind = str(told.get("type", "any"))
    if kind == "array":
        return f"[{_kind(told.get('items', {}))}]"
    bounds = [
        f"{sign} {told[name]}"
        for name, sign in (("minimum", "≥"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if name in told
    ]
    return " ".join([kind, *bounds])
