"""docs/serving.md knows every option, route and parameter of the server."""

from __future__ import annotations

import re

import pytest

from hybrid_k2.server.anthropic_request import MessagesRequest, PromptFields
from hybrid_k2.server.body import Body
from hybrid_k2.server.completion_request import CompletionRequest
from hybrid_k2.server.openai_chat import ChatRequest
from hybrid_k2.server.responses_request import ResponsesRequest
from tests.conftest import REPO
from tests.server.conftest import Client

DOC = (REPO / "docs" / "serving.md").read_text(encoding="utf-8")


def options() -> set[str]:
    import typer.main

    from hybrid_k2.cli.main import app

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")} - {"--help"}


def test_every_option_is_documented_and_none_is_made_up() -> None:
    documented = set(re.findall(r"`(--[a-z][a-z-]+)", DOC))
    assert documented == options()


def test_the_file_of_options_is_one() -> None:
    from hybrid_k2.placement.yaml_tree import Mapping, parse_yaml

    (text,) = re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)
    tree = parse_yaml(text, "docs/serving.md")
    assert isinstance(tree, Mapping)
    assert {f"--{name}" for name in tree.entries} - {"--model"} <= options()


def test_every_option_is_a_variable() -> None:
    import typer.main

    from hybrid_k2.cli.main import app

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    for parameter in command.params:
        if parameter.name != "help":
            assert parameter.envvar == f"HYBRID_K2_{str(parameter.name).upper()}"


def test_every_route_is_documented(client: Client) -> None:
    for path in client.get("/openapi.json").json()["paths"]:
        assert path.replace("/anthropic/", "/").replace("{name}", "NAME").replace("{file_id}", "ID") in DOC, path


@pytest.mark.parametrize("form", [ChatRequest, CompletionRequest, ResponsesRequest, PromptFields, MessagesRequest])
def test_every_parameter_is_documented(form: type[Body]) -> None:
    missing = {name for name in form.model_fields if f"`{name}`" not in DOC} - {"model"}
    assert not missing


def test_the_unit_of_systemd_is_one() -> None:
    lines = (REPO / "docs" / "hybrid-k2.service").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert "hybrid-k2 serve --config" in settings["ExecStart"]
    default = re.search(r"`--drain-timeout SECONDS` \| (\d+)", DOC)
    assert default is not None
    assert int(settings["TimeoutStopSec"]) > int(default[1])


def test_the_tests_that_show_security_are_there() -> None:
    page = (REPO / "docs" / "security.md").read_text()
    for file, name in re.findall(r"`(tests/[\w/]+\.py)`(?: `(\w+)`)?", page):
        text = (REPO / file).read_text()
        assert f"def {name}(" in text if name else text


def test_every_module_is_on_the_map() -> None:
    modules = {path.name for path in (REPO / "hybrid_k2" / "server").glob("*.py")} - {"__init__.py"}
    assert modules == set(re.findall(r"`(\w+\.py)`", DOC.partition("## How it is built")[2]))
