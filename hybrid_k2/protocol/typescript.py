"""One function's JSON schema as a TypeScript declaration, in the dialect that Kimi K2.6 was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INDENT = "  "
CONSTRAINTS: Mapping[str, frozenset[str]] = {
    "string": frozenset({"maxLength", "minLength", "pattern"}),
    "number": frozenset({"maximum", "minimum"}),
    "integer": frozenset({"maximum", "minimum"}),
    "array": frozenset({"maxItems", "minItems"}),
}
UNION_MEMBERS = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
ENUM_CLASSES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
}


class SchemaError(Exception):
    """The schema has no form in this dialect."""


@dataclass
class _Definitions:
    """What `$ref` can name; filled while the schema is walked, so a name must come before its first use."""

    schemas: dict[str, Any] = field(default_factory=dict)
    root_is_named: bool = False  # some schema refers to the root, which then needs a name


def declare_function(function: Mapping[str, Any]) -> str:
    """Declare one function (keys sorted): interfaces, description, type line.

    Raises: SchemaError when a schema has no form in this dialect.
    """
    root = _mapping(function.get("parameters") or {}, "parameters")
    definitions = _Definitions()
    parameters = _object(root, "", definitions)
    blocks = []
    if definitions.root_is_named:
        properties = root.get("properties", {})
        entries = _entries(properties, _required(root), INDENT, definitions)
        blocks.append("interface parameters " + _braces(list(entries.values()), ""))
        parameters = "parameters"
    for name, schema in list(definitions.schemas.items()):
        body = _type(schema, "", definitions)
        blocks.append(_description(_mapping(schema, name), "") + f"interface {name} {body}")
    blocks.append(_description(function, "") + f"type {function['name']} = (_: {parameters}) => any;")
    return "\n".join(blocks)


def _type(schema: Any, indent: str, definitions: _Definitions) -> str:
    if isinstance(schema, bool):
        return "any" if schema else "null"
    schema = _mapping(schema, "schema")
    if "$ref" in schema:
        return _reference(schema["$ref"], definitions)
    if "anyOf" in schema:
        return " | ".join(_type(member, indent, definitions) for member in _list(schema["anyOf"], "anyOf"))
    if "enum" in schema:
        return _enum(schema)
    if "type" in schema:
        return _declared_type(schema, indent, definitions)
    if not schema:
        return "any"
    raise SchemaError(f"schema: expected a type, got the keys {sorted(schema)}")


def _declared_type(schema: Mapping[str, Any], indent: str, definitions: _Definitions) -> str:
    declared = schema["type"]
    if isinstance(declared, list):
        return " | ".join(_union_member(member) for member in declared)
    if declared == "object":
        return _object(schema, indent, definitions)
    if declared == "array":
        return _array(schema, indent, definitions)
    if not isinstance(declared, str):
        raise SchemaError(f"type: expected a name or a list of names, got {declared!r}")
    return "number" if declared == "integer" else declared


def _union_member(member: Any) -> str:
    if not isinstance(member, str) or member not in UNION_MEMBERS:
        raise SchemaError(f"type: expected one of {sorted(UNION_MEMBERS)}, got {member!r}")
    return UNION_MEMBERS[member]


def _object(schema: Mapping[str, Any], indent: str, definitions: _Definitions) -> str:
    if schema.get("$defs"):
        definitions.schemas.update(_mapping(schema["$defs"], "$defs"))
    inner = indent + INDENT
    additional = schema.get("additionalProperties")
    rest = None if additional is None else _additional_type(additional, inner, definitions)
    required = _required(schema)
    by_name = _entries(schema.get("properties", {}), required, inner, definitions)
    names = sorted(by_name, key=lambda name: (name not in required, name))
    entries = [by_name[name] for name in names]
    if rest is not None:
        entries.append(f"{inner}[k: string]: {rest}")
    return _braces(entries, indent) if entries else "{}"


def _additional_type(additional: Any, indent: str, definitions: _Definitions) -> str:
    if isinstance(additional, bool):
        return "any" if additional else "never"
    return _type(additional, indent, definitions)


def _required(schema: Mapping[str, Any]) -> frozenset[str]:
    if "properties" not in schema:
        return frozenset()
    names = _list(schema.get("required", []), "required")
    return frozenset(name for name in names if isinstance(name, str))


def _entries(properties: Any, required: frozenset[str], indent: str, definitions: _Definitions) -> dict[str, str]:
    """Return the text of each property, by name, in key order."""
    entries = {}
    for name, schema in _mapping(properties, "properties").items():
        mark = "" if name in required else "?"
        type_text = _type(schema, indent, definitions)
        entries[name] = f"{_comments(schema, indent)}{_default(schema, indent)}{indent}{name}{mark}: {type_text}"
    return entries


def _array(schema: Mapping[str, Any], indent: str, definitions: _Definitions) -> str:
    items = schema.get("items")
    if not items:
        return "Array<any>"
    inner = indent + INDENT
    comments = _comments(items, inner)
    if not comments:
        return f"Array<{_type(items, indent, definitions)}>"
    return f"Array<\n{comments}{inner}{_type(items, inner, definitions)}\n{indent}>"


def _enum(schema: Mapping[str, Any]) -> str:
    values = _list(schema["enum"], "enum")
    if "type" in schema:
        _check_enum(values, _enum_type(schema["type"]))
    return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in values)


def _enum_type(declared: Any) -> Any:
    """Return the one type that an enum declares beside null."""
    if not isinstance(declared, list):
        return declared
    names = [name for name in declared if name != "null"] if len(declared) == 2 else declared
    if len(names) > 1 or not declared:
        raise SchemaError(f"enum: expected one type and perhaps null, got {declared}")
    return names[0] if names else "null"


def _check_enum(values: Sequence[Any], declared: Any) -> None:
    classes = ENUM_CLASSES.get(declared) if isinstance(declared, str) else None
    for value in values:
        if classes and value is not None and not isinstance(value, classes):
            raise SchemaError(f"enum: expected values of type {declared}, got {value!r}")


def _reference(reference: Any, definitions: _Definitions) -> str:
    if reference == "#":
        definitions.root_is_named = True
        return "parameters"
    prefix, _, name = reference.rpartition("/") if isinstance(reference, str) else ("", "", "")
    if not f"{prefix}/".startswith("#/$defs/") or not isinstance(definitions.schemas.get(name), Mapping):
        raise SchemaError(f"$ref: expected '#' or the name of an earlier definition, got {reference!r}")
    return name


def _comments(schema: Any, indent: str) -> str:
    """Return the comment lines above a property or an array's item: description, then constraints."""
    if isinstance(schema, bool) or not isinstance(schema, Mapping):
        return ""
    text = _description(schema, indent)
    allowed = _constraint_keys(schema)
    limits = ", ".join(f"{key}: {schema[key]}" for key in sorted(schema) if key in allowed)
    return text + (f"{indent}// {limits}\n" if limits else "")


def _constraint_keys(schema: Mapping[str, Any]) -> frozenset[str]:
    if any(key in schema for key in ("$ref", "anyOf", "enum")) or not isinstance(schema.get("type"), str):
        return frozenset()
    return CONSTRAINTS.get(schema["type"], frozenset())


def _default(schema: Any, indent: str) -> str:
    value = schema.get("default") if isinstance(schema, Mapping) else None
    if value is None:
        return ""
    literal = repr(value) if isinstance(value, (int, float)) else json.dumps(value, ensure_ascii=False)
    return f"{indent}// Default: {literal}\n"


def _description(schema: Mapping[str, Any], indent: str) -> str:
    description = schema.get("description")
    if not description:
        return ""
    if not isinstance(description, str):
        raise SchemaError(f"description: expected text, got {type(description).__name__}")
    lines = (f"{indent}// {line}" if line else "" for line in description.split("\n"))
    return "\n".join(lines) + "\n"


def _braces(entries: Sequence[str], indent: str) -> str:
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}" if entries else "{}"


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SchemaError(f"{what}: expected an object, got {type(value).__name__}")
    return value


def _list(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise SchemaError(f"{what}: expected a list, got {type(value).__name__}")
    return value
