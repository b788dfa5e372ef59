"""Files with images: kept for their key, and shown in every dialect."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.server.conftest import Client
from tests.server.image_requests import (
    BOMB,
    CHAT,
    MESSAGES,
    PNG,
    RESPONSES,
    block,
    chat,
    check_picture,
    image_url,
    input_image,
    message,
    response,
    seen,
    upload,
)
from tests.server.scripted import ScriptedService

pytest.importorskip("PIL.Image", reason="Pillow decodes the images: pip install pillow")
pytestmark = pytest.mark.usefixtures("seeing")


def test_the_life_of_a_file_with_an_image(client: Client, service: ScriptedService) -> None:
    for purpose in ("image", "vision"):
        created = upload(client, purpose=purpose).json()
        file_id = created["id"]
        assert (created["bytes"], created["purpose"]) == (len(PNG), purpose)
        content = client.get(f"/v1/files/{file_id}/content")
        assert content.content == PNG
        assert content.headers["content-type"] == "application/octet-stream"
        assert content.headers["content-disposition"] == "attachment"
        for path, body in (
            (CHAT, chat(image_url(f"ms://{file_id}"))),
            (RESPONSES, response(input_image(file_id=file_id))),
            (MESSAGES, message(block(type="file", file_id=file_id))),
        ):
            reply = client.post(path, body)
            assert reply.status_code == 200, reply.text
            check_picture(seen(service)[0])
        client.request("DELETE", f"/v1/files/{file_id}")
        assert client.post(CHAT, chat(image_url(f"ms://{file_id}"))).status_code == 400


def test_a_file_must_be_an_image_of_the_same_key(make_client: Callable[..., Client]) -> None:
    client = make_client(api_keys=("anna", "ben"))
    anna, ben = ({"x-api-key": key} for key in ("anna", "ben"))
    image = upload(client, headers=anna).json()["id"]
    words = upload(client, b"text", "file-extract", headers=anna).json()["id"]
    place = "messages[0].content[0].image_url.url"
    assert client.post(CHAT, chat(image_url(f"ms://{image}")), headers=anna).status_code == 200
    for file_id, key in ((image, ben), (words, anna), ("file-0", anna), ("", anna), ("../" + image, anna)):
        refused = client.post(CHAT, chat(image_url(f"ms://{file_id}")), headers=key)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, place)


@pytest.mark.parametrize("content", [b"", b"text", PNG[:60], BOMB, b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_no_image_is_not_kept(client: Client, content: bytes) -> None:
    refused = upload(client, content)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file"), refused.text
    assert client.get("/v1/files").json()["data"] == []


def test_images_are_kept_where_a_model_sees_them(make_client: Callable[..., Client], service: ScriptedService) -> None:
    assert upload(make_client(ready=False)).status_code == 503
    service.images = None
    refused = upload(make_client())
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "purpose")
    assert "reads text only" in refused.json()["error"]["message"]
