"""The page at `/`: who gets it, what a browser may do with it, what it is made of."""

import re
from importlib.resources import files

import httpx
import pytest

from pipeline.gateway.http.page import HEADERS, page_routes

PAGE = files("pipeline.gateway") / "page"
SOURCES = {each.name: each.read_text() for each in PAGE.iterdir() if not each.name.endswith("webp")}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}


def without_comments(text):
    return re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)


@pytest.fixture
def browse(start_gateway):
    """Starts a gateway with the page; gives a client of it, without a key, and what runs."""

    def start(**options):
        return start_gateway(page=page_routes(), **options)

    return start


async def test_anybody_gets_the_page_and_nobody_anything_else_without_a_key(browse):
    async with browse() as gateway, httpx.AsyncClient(base_url=gateway.url) as client:
        for route in page_routes():
            answer = await client.get(route.path)
            assert answer.status_code == 200, route.path
            assert answer.content
        for path in ("/pipeline", "/metrics", "/v1/models", "/page/", "/page/none.js"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.post("/")).status_code == 405


async def test_what_is_sent_is_told_apart_from_what_runs(browse):
    """Attack: a file that a browser takes for another kind than it is."""
    kinds = {"/": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    async with browse() as gateway, httpx.AsyncClient(base_url=gateway.url) as client:
        for route in page_routes():
            answer = await client.get(route.path)
            kind = kinds[route.path.rpartition(".")[2]]
            assert answer.headers["content-type"].startswith(kind), route.path
            for name, value in HEADERS.items():
                assert answer.headers[name] == value


async def test_showing_the_page_costs_no_client_a_request(browse):
    async with browse(requests_per_minute=1) as gateway:
        async with httpx.AsyncClient(base_url=gateway.url) as client:
            for _ in range(3):
                assert (await client.get("/")).status_code == 200
            client.headers["authorization"] = "Bearer sk-test-0123456789"
            assert (await client.get("/v1/models")).status_code == 200
        assert gateway.metric("veilpipe_http_requests_total", route="/", status="200") == 3


@pytest.mark.parametrize("path", ["/", "/page/main.js"])
async def test_without_the_page_there_is_nothing_there(start_gateway, path):
    async with start_gateway() as gateway, httpx.AsyncClient(base_url=gateway.url) as client:
        assert (await client.get(path)).status_code == 401
        client.headers["authorization"] = "Bearer sk-test-0123456789"
        assert (await client.get(path)).status_code == 404


@pytest.mark.parametrize("path", ["/page/../http/page.py", "/page/%2e%2e/__init__.py", "/page/x"])
async def test_no_path_leads_out_of_the_page(browse, path):
    async with browse() as gateway, httpx.AsyncClient(base_url=gateway.url) as client:
        client.headers["authorization"] = "Bearer sk-test-0123456789"
        assert (await client.get(path)).status_code == 404


def test_the_policy_allows_what_this_server_serves_and_nothing_else():
    policy = HEADERS["content-security-policy"]
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts.pop("require-trusted-types-for") == "'script'"
    assert parts["default-src"] == "'none'"
    assert set(parts.values()) == {"'self'", "'none'"}
    for name in ("frame-ancestors", "form-action", "base-uri", "trusted-types"):
        assert parts[name] == "'none'"


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_fetched_from_elsewhere(name):
    known = ("http://www.w3.org/2000/svg",)  # a name, which nobody fetches
    found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", without_comments(SOURCES[name]))
    assert not [address for address in found if address not in known]
    assert "@import" not in SOURCES[name]
    assert "url(" not in SOURCES[name]


def test_all_that_the_page_names_is_served():
    paths = {route.path for route in page_routes()}
    html = SOURCES["index.html"]
    named = {f"/{path}" for path in re.findall(r'(?:src|href)="(page/[^"]+)"', html)}
    for text in SCRIPTS.values():
        named |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named | {"/"} == paths


def test_the_document_has_no_script_or_style_of_its_own():
    """The policy forbids them: what is written here would not be run, and be missed."""
    html = SOURCES["index.html"]
    assert not re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", html)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_elements_or_code_of_a_string(name):
    """Attack: what a model says becomes a script, with the API key at hand."""
    makers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|"
    makers += r"DOMParser|createContextualFragment|setHTML|import\("
    assert not re.findall(makers, without_comments(SCRIPTS[name]))


def test_the_key_is_kept_by_the_tab_alone():
    """Attack: whoever uses the browser next, and whatever reads addresses or cookies."""
    code = {name: without_comments(text) for name, text in SCRIPTS.items()}
    assert [name for name, text in code.items() if "sessionStorage" in text] == ["api.js"]
    assert not [name for name, text in code.items() if "document.cookie" in text]
    assert not [name for name, text in code.items() if "indexedDB" in text]
    kept = {
        found for text in code.values() for found in re.findall(r"localStorage\.\w+\((\w+)", text)
    }
    assert kept == {"THEME"}
    assert 'id="key" type="password" autocomplete="off"' in SOURCES["index.html"]


def test_a_wheel_would_carry_all_of_it():
    import tomllib
    from fnmatch import fnmatch
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["pipeline.gateway"]
    for name in SOURCES:
        assert any(fnmatch(f"page/{name}", pattern) for pattern in patterns), name
