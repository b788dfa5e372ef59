"""Promises of docs/security.md that belong to no feature of the server alone."""

from __future__ import annotations

import ast
import hmac
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.demo import demo_path
from hybrid_k2.engine import Engine
from hybrid_k2.protocol import ImageFormat
from hybrid_k2.server.auth import ApiKeys
from tests.conftest import REPO
from tests.server.conftest import Client
from tests.server.scripted import ScriptedService
from tests.server.test_chat import HELLO, PATH

SOURCES = sorted((REPO / "hybrid_k2").rglob("*.py"))
RUNS_DATA = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jinja2", "runpy"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


def names(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports, and the plain functions that it calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_nothing_of_the_package_runs_data() -> None:
    """No pickles, no text that becomes code, no templates."""
    assert len(SOURCES) > 100
    wrong = RUNS_DATA | RUNS_TEXT | {"torch.load", "numpy.load", "np.load", "yaml.load", "os.system"}
    for path in SOURCES:
        assert not wrong & set(names(ast.parse(path.read_text(encoding="utf-8")))), path


def test_code_in_the_folder_of_a_model_is_not_run(tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "was-run"
    shutil.copytree(demo_path(), folder)
    code = f"open({str(mark)!r}, 'w').close()\n"
    for name in ("modeling_k2.py", "configuration_k2.py", "tokenization_kimi.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "configuration_k2.K2Config", "AutoModel": "modeling_k2.K2"}}
    (folder / "config.json").write_text(json.dumps(config))
    with Engine.load(folder) as engine:
        assert engine.tokenizer.encode("text")
    assert not mark.exists()


def test_every_key_is_compared_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By digests of one length, in constant time: neither its place nor its beginning takes another time."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    keys = ApiKeys(("first", "second", "third"))
    for key, known in (("first", True), ("third", True), ("none", False), ("", False), ("x" * 1000, False)):
        compared.clear()
        assert (keys.owner(key) is not None) is known
        assert compared == [(32, 32)] * 3


def test_no_connection_is_opened_for_a_request(client: Client, service: ScriptedService) -> None:
    service.images = ImageFormat()  # a model that sees
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x"
        schema = {"$id": url, "$schema": url, "$ref": url, "properties": {"a": {"$ref": f"{url}#/a"}}}
        image = {"type": "image_url", "image_url": {"url": url}}
        changes: list[dict[str, Any]] = [
            {"messages": [{"role": "user", "content": [image]}]},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            {"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": schema}}]},
        ]
        for change in changes:
            assert client.post(PATH, {**HELLO, **change}).status_code == 400
        source = {"type": "url", "url": url}
        message = {"role": "user", "content": [{"type": "image", "source": source}]}
        body = {"model": "k2", "max_tokens": 5, "messages": [message]}
        assert client.post("/v1/messages", body).status_code == 400
        message = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
        assert client.post("/v1/responses", {"model": "k2", "input": [message]}).status_code == 400
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


@pytest.mark.parametrize("name", ["x-forwarded-host", "forwarded", "x-real-ip", "x-forwarded-for", "x-original-url"])
def test_headers_of_proxies_are_not_believed(make_client: Callable[..., Client], name: str) -> None:
    headers = {name: "host=localhost" if name == "forwarded" else "localhost"}
    client = make_client(hosts=("localhost",))
    assert client.get("/health", headers={**headers, "host": "evil.example"}).status_code == 403
    client = make_client(api_keys=("key",))
    assert client.get("/v1/models", headers={**headers, "x-original-url": "/health"}).status_code == 401


def test_a_key_in_a_query_or_a_body_is_none(make_client: Callable[..., Client]) -> None:
    client = make_client(api_keys=("key",))
    assert client.post(f"{PATH}?api_key=key&key=key&access_token=key", {**HELLO, "api_key": "key"}).status_code == 401
