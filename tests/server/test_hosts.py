"""Names by which the server may be addressed, against pages that take its address for their own name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hybrid_k2.errors import ConfigError
from hybrid_k2.server.hosts import is_known_host
from hybrid_k2.server.options import ServerOptions
from tests.server.conftest import Client


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LocalHost:8000", True),
        ("localhost.", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.7.7", True),  # of a port that is forwarded
        ("gpu-box:8000", True),
        (None, True),
        ("", False),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("[evil.example]", False),
        ("evil.example:localhost", False),
        ("1234567", False),
    ],
)
def test_hosts(host: str | None, known: bool) -> None:
    assert is_known_host(host, ("localhost", "GPU-box")) is known
    assert is_known_host(host, ())
    assert is_known_host(host, ("localhost", "*"))


@pytest.mark.parametrize("name", ["", "http://k2.example", "k2.example:8000", "k2.example/", "[::1]", "two names"])
def test_names_that_no_request_would_match(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed host: expected a name without scheme and port"):
        ServerOptions(model_names=("k2",), hosts=("localhost", "::1", "10.0.0.1", "*", name))


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/openapi.json"])
def test_a_page_that_took_this_address_for_its_name_is_refused(make_client: Callable[..., Client], path: str) -> None:
    client = make_client(hosts=("localhost",))
    rebound = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}  # its own server, for a browser
    response = client.get(path, headers=rebound)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "foreign_host"
    assert "--allowed-host" in response.json()["error"]["message"]
    assert client.get(path, headers={"host": "localhost:8000"}).status_code == 200
