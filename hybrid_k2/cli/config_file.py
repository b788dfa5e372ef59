"""`--config FILE`: options of a command from a YAML file, under their names on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hybrid_k2.errors import ConfigError
from hybrid_k2.placement.yaml_tree import Mapping, Node, Scalar, parse_yaml, read_text


def use_config_file(context: typer.Context, file: Path | None) -> Path | None:
    """Take the file's values as the defaults of the command: its options and environment variables go before.

    Raises: RulesError: no YAML. ConfigError naming file and line: an unknown option, or a value of the wrong form.
    """
    if file is None:
        return None
    source = str(file)
    root = parse_yaml(read_text(file, source, "file of options"), source)
    if not isinstance(root, Mapping):
        raise ConfigError(f"{source}:{root.line}: expected options and their values, got something else")
    parameters = {_name_in_file(parameter): parameter for parameter in context.command.params}
    defaults: dict[str, Any] = {}
    for name, node in root.entries.items():
        parameter = parameters.get(name)
        if parameter is None or name in ("config", "help"):
            raise ConfigError(
                f"{source}:{root.key_lines[name]}: expected an option of the command, got {name!r}",
                hint=f"it has {', '.join(sorted(parameters.keys() - {'config', 'help'}))}",
            )
        defaults[parameter.name or name] = _value(node, bool(getattr(parameter, "multiple", False)), source, name)
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


def _name_in_file(parameter: Any) -> str:
    """Return the longest name without its dashes: `served-model-name`; of an argument, its name."""
    longest = max(parameter.opts, key=len)
    return str(longest).lstrip("-").replace("_", "-")


def _value(node: Node, multiple: bool, source: str, name: str) -> str | list[str]:
    if isinstance(node, Scalar):
        return [node.text] if multiple else node.text
    if multiple and not isinstance(node, Mapping):
        texts = [item.text for item in node.items if isinstance(item, Scalar)]
        if len(texts) == len(node.items):
            return texts
    raise ConfigError(f"{source}:{node.line}: {name}: expected {'a list of values' if multiple else 'one value'}")
