"""`response_format`: a grammar for the reply's content, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_k2.engine.grammar import Grammar
from hybrid_k2.errors import RequestError, shown
from hybrid_k2.server.body import check_fields
from hybrid_k2.server.conversation import check_schema
from hybrid_k2.server.errors import bad_request
from hybrid_k2.server.options import Limits


def read_response_format(response_format: Any, limits: Limits) -> Grammar | None:
    """Compile the grammar that a chat's `response_format` asks for. Raises: ApiError, RequestError."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise bad_request("response_format", f"expected an object with a type, got {shown(response_format)}")
    kind = response_format.get("type")
    known = ("type", "json_schema") if kind == "json_schema" else ("type",)
    check_fields(response_format, known, "response_format", f"a format of type {shown(kind)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_object()
    if kind != "json_schema":
        raise bad_request("response_format.type", f"expected text, json_object or json_schema, got {shown(kind)}")
    wrapper = response_format.get("json_schema")
    if not isinstance(wrapper, Mapping):
        raise bad_request("response_format.json_schema", f"expected an object with a schema, got {shown(wrapper)}")
    check_fields(
        wrapper, ("name", "description", "schema", "strict"), "response_format.json_schema", "a format with a schema"
    )
    schema = check_schema(wrapper.get("schema"), "response_format.json_schema.schema", limits)
    try:
        return Grammar.json_schema(schema)
    except RequestError as error:
        raise bad_request("response_format.json_schema", error.message, "invalid_schema") from None
