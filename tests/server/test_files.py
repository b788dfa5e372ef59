"""Files: kept to the byte, each key its own, found by id alone."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from hybrid_k2.server import file_store
from hybrid_k2.server.errors import ApiError
from hybrid_k2.server.multipart import read_upload
from tests.server.conftest import Client

PATH = "/v1/files"


def upload(
    client: Client, content: bytes = b"text", name: str = "a.txt", purpose: str = "file-extract", **more: Any
) -> Any:
    return client.post(
        PATH, files={"file": (name, content)}, data={"purpose": purpose, **more.pop("fields", {})}, **more
    )


def test_the_life_of_a_file(client: Client) -> None:
    content = "Zürich\r\n--boundary\r\n\x00 <script>".encode()
    created = upload(client, content, "Bericht Ä.txt").json()
    assert created["id"].startswith("file-")
    assert (created["object"], created["bytes"], created["filename"]) == ("file", len(content), "Bericht Ä.txt")
    path = f"{PATH}/{created['id']}"
    assert client.get(path).json() == created
    assert client.get(PATH).json()["data"] == [created]
    response = client.get(f"{path}/content")
    assert response.content == content
    assert response.headers["content-type"].startswith("text/plain")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert client.request("DELETE", path).json()["deleted"] is True
    assert client.get(path).status_code == 404
    assert client.get(PATH).json()["data"] == []


def test_files_of_another_key_do_not_exist(make_client: Callable[..., Client]) -> None:
    client = make_client(api_keys=("anna", "ben"))
    anna, ben = ({"x-api-key": key} for key in ("anna", "ben"))
    path = f"{PATH}/{upload(client, headers=anna).json()['id']}"
    assert client.get(path, headers=anna).status_code == 200
    assert client.get(PATH, headers=ben).json()["data"] == []
    for method, place in (("GET", path), ("GET", f"{path}/content"), ("DELETE", path)):
        assert client.request(method, place, headers=ben).status_code == 404
    assert client.get(path, headers=anna).status_code == 200


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\..\\x", "/etc/passwd", "a" * 1000, "CON", ".."])
def test_names_are_only_shown(client: Client, name: str) -> None:
    created = upload(client, name=name).json()
    assert "/" not in created["id"]
    assert len(created["filename"]) <= 255


@pytest.mark.parametrize(
    "file_id", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "file-" + "0" * 24, "x" * 3000, "%00", "file-*"]
)
def test_ids_that_are_none(client: Client, file_id: str) -> None:
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert client.request(method, f"{PATH}/{file_id}{path}").status_code in (404, 405)


def test_wrong_uploads(client: Client) -> None:
    for response, param in (
        (upload(client, b"\xff\xfe"), "file"),
        (upload(client, purpose="video"), "purpose"),
        (upload(client, purpose="image"), "purpose"),
        (upload(client, fields={"expires": "5"}), "expires"),
        (client.post(PATH, {"file": "x"}), "file"),
        (client.post(PATH, data={"purpose": "file-extract"}, files={"other": b"x"}), "file"),
        (client.post(PATH, content=b"x", headers={"content-type": "multipart/form-data"}), "file"),
        (client.post(PATH, content=b"x", headers={"content-type": "multipart/form-data; boundary=y"}), "file"),
        (client.post(PATH, files=[("file", b"x"), ("file", b"y")]), "file"),
        (client.post(PATH, files=[(f"f{number}", b"x") for number in range(20)]), "file"),
    ):
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param, response.text


def test_there_is_an_end_of_room(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_store, "MAX_BYTES", 10)
    assert upload(client, b"12345678").status_code == 200
    assert upload(client, b"123").status_code == 400
    monkeypatch.setattr(file_store, "MAX_FILES", 2)
    assert upload(client, b"1").status_code == 200
    assert upload(client, b"").status_code == 400


def test_a_form_of_many_lines_or_parts_takes_no_time() -> None:
    kind = "multipart/form-data; boundary=b"
    head = b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\n'
    lines = b"\r\n" * 2_000_000
    before = time.process_time()
    assert read_upload(kind, head + lines + b"\r\n--b--\r\n").content == lines
    with pytest.raises(ApiError, match="1 to 10 parts"):
        read_upload(kind, head + b"\r\n--b" * 2_000_000)
    assert time.process_time() - before < 1, "a parser that looks at each line takes many seconds"


@pytest.mark.parametrize(
    "value", ["(" * 4000, '"' * 4000, "a*0=b;" * 600, "=?utf-8?q?a?= " * 280, '(name="file")', "\0"]
)
def test_headers_of_a_form_that_try_its_parser(value: str) -> None:
    form = f"--b\r\ncontent-disposition: form-data; {value}\r\n\r\nhello\r\n--b--\r\n".encode()
    with pytest.raises(ApiError, match="file: expected"):
        read_upload("multipart/form-data; boundary=b", form)


def test_bent_forms_are_refused() -> None:
    kind = "multipart/form-data; boundary=b"
    good = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nhello\r\n--b--\r\n'
    assert read_upload(kind, good) == ("x", b"hello", {})
    source = random.Random(5)
    for _ in range(300):
        bent = bytearray(good)
        place = source.randrange(len(bent))
        del bent[place : place + source.randint(0, 5)]
        bent.insert(source.randrange(len(bent) + 1), source.randrange(256))
        with contextlib.suppress(ApiError):
            assert isinstance(read_upload(kind, bytes(bent)).content, bytes)
