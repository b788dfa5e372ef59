"""The status as JSON: what it says in each state, and what it keeps to itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from tests.server.conftest import Client
from tests.server.scripted import ScriptedService

MakeClient = Callable[..., Client]
PATH = "/v1/hybrid-k2/status"


def test_the_status_of_a_server_that_serves(make_client: MakeClient, service: ScriptedService) -> None:
    status = make_client(model_names=("k2", "alias")).get(PATH).json()
    assert (status["state"], status["model"], status["context_tokens"]) == ("ready", "k2", 4096)
    assert status["uptime_s"] >= 0
    assert status["service"] == asdict(service.stats())
    plan, values = service.plan, status["plan"]
    assert {name: device["bytes"] for name, device in values["devices"].items()} == {
        device: plan.bytes_on(device) for device in plan.devices
    }
    held = sum(part["bytes"] for part in values["groups"] + values["overheads"]) + values["kv_cache"]["bytes"]
    assert held == sum(device["bytes"] for device in values["devices"].values())


def test_the_status_while_it_loads_and_drains(make_client: MakeClient) -> None:
    client = make_client(ready=False)
    client.backend.report_loading(25, 100)
    status = client.get(PATH).json()
    assert (status["state"], status["loading"]) == ("loading", {"read_bytes": 25, "total_bytes": 100})
    assert status["service"] is status["plan"] is status["context_tokens"] is None
    client = make_client()
    client.backend.drain()
    assert client.get(PATH).json()["state"] == "draining"


def test_which_experts_are_used(make_client: MakeClient, service: ScriptedService) -> None:
    assert make_client().get("/v1/hybrid-k2/experts").json() == {
        "layers": [1, 2],
        "counts": [[3, 0, 1], [0, 2, 2]],
        "hot": [[], [1]],
    }
    assert make_client(ready=False).get("/v1/hybrid-k2/experts").json()["error"]["code"] == "loading"


def test_it_names_no_file_of_the_machine(client: Client, service: ScriptedService) -> None:
    text = json.dumps(client.get(PATH).json())
    assert service.plan.rules.source not in text
    assert "/" not in text.replace("/s", "")
