"""The page that `/` shows a browser, and what a browser may do with it.

What it is made of lies in `pipeline/gateway/page` and is the same for everybody, so that it wants
no key: whoever opens it types one in, and its requests carry that as any client's do.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Attacks: a text, of a model or whoever wrote its prompt, that becomes a script, an image whose
# address carries the conversation away, or a form; a site that shows this page in a frame and has
# its buttons pressed. Of scripts and styles those of this server run and no others, not even in the
# page itself; nothing is asked of any other host; and no string can be made into elements
# (`require-trusted-types-for`: the browser refuses innerHTML and its like).
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",  # for browsers that do not know frame-ancestors
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    # A server that has been updated is seen as it is.
    "cache-control": "no-cache",
}


def page_routes() -> Sequence[Route]:
    """What is served of the page; every path of it is known beforehand, and nothing is looked up.

    Attack: a path that leads out of the directory.
    """
    found = [each for each in (files("pipeline.gateway") / "page").iterdir() if each.is_file()]
    return [
        _route("/" if each.name == "index.html" else f"/page/{each.name}", each.read_bytes(), kind)
        for each in found
        if (kind := _MEDIA_TYPES.get(each.name.rpartition(".")[2])) is not None
    ]


def _route(path: str, content: bytes, media_type: str) -> Route:
    async def show(_: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return Route(path, show)
