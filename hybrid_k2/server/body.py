"""From the bytes of a request to checked fields; what is wrong is a 400 that names the parameter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema
from starlette.requests import Request

from hybrid_k2.errors import RequestError, shown
from hybrid_k2.files import parse_json_object
from hybrid_k2.server.errors import ApiError, bad_request

INLINE_BYTES = 64 * 2**10
_MAX_COMMAS = 1_000_000  # of a body, in texts too: as many values, which take a hundred times the memory of the text
_MAX_LEVELS = 128  # of a body; far beyond any real one, and well inside the recursion limit of Python

AnyObject = Annotated[Any, WithJsonSchema({"type": "object"})]  # a field whose parts are checked by hand


class Body(BaseModel):
    """The fields that a route knows. Types are not converted, and a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def text_field(fields: Mapping[str, Any], name: str, place: str) -> str:
    """Return a text of an object that is checked by hand. Raises: ApiError naming the field."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{place}.{name}", f"expected a text, got {shown(value)}")
    return value


def check_fields(fields: Mapping[str, Any], known: Collection[str], place: str, what: str) -> None:
    """Refuse a field that is not known; one that is empty, as libraries send them, says nothing. Raises: ApiError."""
    for name, value in fields.items():
        if name not in known and value not in (None, [], {}, ""):
            raise bad_request(f"{place}.{name}", f"expected no such field in {what}")


BodyType = TypeVar("BodyType", bound=Body)
Result = TypeVar("Result")


async def read_body(request: Request, form: type[BodyType]) -> BodyType:
    """Read a request's JSON body. A field that is null counts as absent. Raises: ApiError."""
    return await apart(request, partial(parse_body, await request.body(), form))


async def apart(request: Request, work: Callable[[], Result]) -> Result:
    """Do what goes through the whole body: in a thread where that is large, and would hold up the other requests."""
    if len(await request.body()) > INLINE_BYTES:
        return await asyncio.to_thread(work)
    return work()


def parse_body(body: bytes, form: type[BodyType]) -> BodyType:
    """Parse and check a JSON body. Raises: ApiError."""
    if body.count(b",") > _MAX_COMMAS:
        raise ApiError(413, f"body: expected at most {_MAX_COMMAS} values, got more commas than that")
    try:
        fields = parse_json_object(body, "body", RequestError)
    except RequestError as error:
        raise ApiError(400, error.message, code="invalid_json") from None
    _check_levels(fields)
    return parse_fields(fields, form)


def _check_levels(fields: dict[str, Any]) -> None:
    """Refuse nesting that would be too deep for what reads it later. Raises: ApiError."""
    level: list[Any] = [fields]
    for _ in range(_MAX_LEVELS):
        values = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise ApiError(400, f"body: expected at most {_MAX_LEVELS} levels of nesting, got more", code="invalid_json")


def parse_fields(fields: Mapping[str, Any], form: type[BodyType]) -> BodyType:
    """Check the fields of a body. Raises: ApiError naming the first one that is wrong."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name not in form.model_fields:  # at once: pydantic would make an error of each of a million
            raise _parameter_error((name,), "extra_forbidden", "", None)
    try:
        return form.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise _parameter_error(first["loc"], first["type"], first["msg"], first["input"]) from None


def body_schema(form: type[Body]) -> dict[str, Any]:
    """Return what the OpenAPI description of a route says about its body."""
    schema = form.model_json_schema()
    schema = _inline(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inline(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Put the definitions where they are referred to; none of our forms contains itself."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(value, definitions) for name, value in schema.items()}


def _parameter_error(place: tuple[int | str, ...], kind: str, message: str, value: object) -> ApiError:
    name = _name(place)
    if kind == "extra_forbidden":
        return bad_request(name, "expected no such parameter; this server does not know it", "unknown_parameter")
    if kind == "missing":
        return bad_request(name, "expected it, got nothing", "missing_parameter")
    expected = message.replace("Input should be", "expected", 1)
    return bad_request(name, f"{expected[:1].lower()}{expected[1:]}, got {shown(value)}", "invalid_value")


def _name(place: tuple[int | str, ...]) -> str:
    """Write a place as `stream_options.include_usage` or `stop[2]`."""
    name = ""
    for step in place:
        if isinstance(step, int):
            name += f"[{step}]"
        else:
            shown_step = step[:100] if step.isprintable() else shown(step)
            name += f".{shown_step}" if name else shown_step
    return name
