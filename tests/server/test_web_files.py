"""The files of the web page: what a browser gets, and under which rules."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import pytest

from hybrid_k2.server.web_page import FOLDER
from tests.server.conftest import Client, run

MakeClient = Callable[..., Client]
PATHS = {"/" if path.name == "index.html" else f"/web/{path.name}": path for path in FOLDER.iterdir()}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@pytest.mark.parametrize("path", PATHS)
def test_every_file_is_served_with_its_type_and_the_policy(make_client: MakeClient, path: str) -> None:
    response = make_client(api_keys=("key",)).get(path)  # without a key
    assert response.status_code == 200
    assert response.content == PATHS[path].read_bytes()
    assert response.headers["content-type"].split(";")[0] == TYPES[PATHS[path].suffix]
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"  # those that the reader attaches
    assert "unsafe" not in response.headers["content-security-policy"]


def test_the_browser_asks_whether_its_copy_is_the_same(client: Client) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for asked in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/", headers={"if-none-match": asked})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert "content-security-policy" in again.headers
    assert client.get("/", headers={"if-none-match": '"other"'}).content == first.content
    assert len({client.get(path).headers["etag"] for path in PATHS}) == len(PATHS)


def test_head_tells_the_same_without_the_body(client: Client) -> None:
    whole, head = client.get("/web/main.js"), client.request("HEAD", "/web/main.js")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))
    assert head.headers["etag"] == whole.headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "/web/",
        "/web/index.html",
        "/web/none.js",
        "/web/../app.py",
        "/web/..%2fapp.py",
        "/web/%2e%2e/app.py",
        "/web/..%5capp.py",
        "/web//etc/passwd",
        "/web/%2fetc%2fpasswd",
        "/web/main.js%00.css",
        "/web/sub/main.js",
        "/index.html",
    ],
)
def test_nothing_else_is_served(client: Client, path: str) -> None:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(client.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as raw:
            url = httpx.URL("http://server").copy_with(raw_path=path.encode())  # as it stands, not tidied up
            return await raw.get(url)

    response = run(call())
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


def test_with_keys_the_rest_stays_closed(make_client: MakeClient) -> None:
    client = make_client(api_keys=("key",))
    assert client.get("/web/none.js").status_code == 401
    assert client.post("/").status_code == 405
    assert client.get("/v1/hybrid-k2/status").status_code == 401


def test_it_can_be_switched_off(make_client: MakeClient) -> None:
    client = make_client(web=False)
    assert {client.get(path).status_code for path in PATHS} == {404}
    assert client.get("/v1/hybrid-k2/status").status_code == 200
    assert make_client(web=False, api_keys=("key",)).get("/").status_code == 401


def test_the_page_is_whole_and_has_nothing_inline() -> None:
    """What the policy forbids must not be there: scripts and styles within the page, and things from elsewhere."""
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\son\w+=|javascript:", page)
    named = set(re.findall(r'(?:src|href)="(web/[^"]+)"', page))
    for path in FOLDER.glob("*.js"):
        text = path.read_text()
        named |= {f"web/{name}" for name in re.findall(r'from "\./([^"]+)"', text)}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
    assert named == {path.removeprefix("/") for path in PATHS} - {""}
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    used = {name for path in FOLDER.glob("*.js") for name in re.findall(r'byId\("([^"]+)"\)', path.read_text())}
    assert used <= ids
    for path in FOLDER.iterdir():
        for address in re.findall(r"https?://[^\s\"'`<>/)]+", path.read_text()):
            assert address == "http://www.w3.org", f"{path.name} names {address}"
