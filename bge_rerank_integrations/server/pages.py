"""The two web pages, `/` and `/docs`, and the files that they load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER: Final = Path(__file__).with_name("page")
_CONTENT_TYPES: Final[Mapping[str, str]] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# The pages load only their own files and talk only to their own server. Trusted Types prevent the browser
# from turning a string into markup or code, so it shows a text of the user as plain text.
_CONTENT_SECURITY_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
_HEADERS: Final[Mapping[str, str]] = {
    # The browser checks each file with its ETag before it uses a stored copy. A page therefore never mixes
    # files of two versions.
    "cache-control": "no-cache",
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes() -> list[Route]:
    """Return the routes of the pages and their files. They need no key, because they contain no data.

    The pages use relative URLs only, so they also work behind a proxy that serves them under a prefix.
    """
    files = {path.name: path for path in sorted(_FOLDER.iterdir()) if path.suffix in _CONTENT_TYPES}
    urls = {"/": "index.html", "/docs": "docs.html"}
    urls |= {f"/page/{name}": name for name in files if name not in urls.values()}
    return [_route(url, files[name]) for url, name in urls.items()]


def _route(url: str, path: Path) -> Route:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": etag}

    async def respond(request: Request) -> Response:
        stored = request.headers.get("if-none-match", "").split(",")
        if {each.strip().removeprefix("W/") for each in stored} & {etag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(content, headers={**headers, "content-type": _CONTENT_TYPES[path.suffix]})

    return Route(url, respond, methods=["GET"])
