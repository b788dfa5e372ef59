"""The web page at `/`: a few files of the package, which a browser may use in one way only.

They hold no secrets and need no key; what the page asks the server for does. The policy lets the browser load scripts,
styles and data from this server alone, forbids scripts within the page, frames around it, and text that becomes HTML.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.server.errors import ApiError

FOLDER = Path(__file__).resolve().parent / "web"
PREFIX = "/web/"
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",  # for browsers that do not know frame-ancestors
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # ask each time; unchanged files are answered with 304
}


@dataclass(frozen=True)
class WebFile:
    """One file of the page, and its name in a browser's cache."""

    content: bytes
    media_type: str
    etag: str

    def answer(self, asked: str | None) -> Response:
        """Return the file, or 304 where the browser's copy is the same; `asked`: the header If-None-Match."""
        headers = {**_HEADERS, "etag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in (asked or "").split(",")}
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def read_web_files() -> dict[str, WebFile]:
    """Return the files by the path at which they are served: read once, so that no path of a request meets the disk."""
    files = {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in _TYPES}
    return {"/": files.pop(_INDEX), **{PREFIX + name: file for name, file in files.items()}}


def web_routes(files: Mapping[str, WebFile]) -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    @router.get(PREFIX + "{name}")
    async def get_web_file(request: Request) -> Response:
        """Give a file of the page."""
        file = files.get(request.scope["path"])
        if file is None:
            raise ApiError(404, "route: expected one of this server's, got another")
        return file.answer(request.headers.get("if-none-match"))

    return router


def _read(path: Path) -> WebFile:
    content = path.read_bytes()
    return WebFile(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
