"""What a reply must look like: a JSON schema for its content, or the declared tools for its calls.

A grammar is text in the language of llguidance. That library turns it into masks of tokens; its work is bounded here:
the size and depth of a schema before it is compiled, then the library's own fuel for each step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from hybrid_k2.errors import RequestError, shown
from hybrid_k2.protocol import expand_builtins
from hybrid_k2.protocol.tokens import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_DEPTH = 100  # levels of a schema; llguidance itself reads 128
MAX_MEMBERS = 500  # of one object; a choice among 500 properties takes 20 ms for a mask, among 5000 seconds to compile
MAX_SCHEMA_CHARACTERS = 2**18
MAX_GRAMMAR_CHARACTERS = 2**20  # all tools together
MAX_BITS = 64  # of an integer in a schema; llguidance reads no more
_SHOWN_REASON = 300
_PLAIN_WORDS = {"NoExtensionBias": "one that none fits"}

# White space as printers of JSON write it, and no more: models are known to write nothing else for ever.
_OPTIONS = {"whitespace_pattern": r"( |\n {0,20}|\n\t{0,10})?"}
_TOLERANT = {**_OPTIONS, "lenient": True, "coerce_one_of": True}  # what cannot be enforced is left to the model
_ANY_OBJECT = {"type": "object"}
_HEADER = "%llguidance {}\n"
_START = _HEADER + "start: "


@dataclass(frozen=True)
class Grammar:
    """Bind a reply. It holds from the end of the thinking on, which stays free.

    `content`: the whole content fits the source. `calls`: each section of tool calls does; the text around it is free.
    """

    source: str  # a grammar in llguidance's dialect of Lark
    binds: Literal["content", "calls"]
    calls: bool = False  # a section of calls may come; in place of the content, where that is what is bound
    required: bool = False  # the reply is one section of calls and nothing else
    repeats: bool = True  # more than one section may come

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """Bind the content to a JSON schema; properties come in the schema's order.

        Raises: RequestError for a schema that is wrong, too large, or has keywords that cannot be enforced.
        """
        if not isinstance(schema, (Mapping, bool)):
            raise RequestError(f"schema: expected a JSON schema, got {shown(schema)}")
        copied = _copy_json(schema, "schema", 0) if isinstance(schema, Mapping) else ({} if schema else {"not": {}})
        return cls(_START + _valid_rule(copied, _OPTIONS, "schema"), "content")

    @classmethod
    def json_object(cls) -> Grammar:
        """Bind the content to any JSON object. Raises: RequestError where llguidance is not installed."""
        return cls.json_schema(_ANY_OBJECT)

    @classmethod
    def tools(cls, tools: Sequence[Mapping[str, Any]], choice: str = "auto", *, parallel: bool = True) -> Grammar:
        """Bind names and arguments of calls to the declared tools.

        `choice`: "auto" leaves it to the model whether to call, "required" makes it call, a tool's name makes it call
        that one, once. Without `parallel`, a reply has at most one call. A tool with `strict: true` must have a schema
        that can be enforced; of another's, what cannot be is left to the model. Properties come as the model reads
        them: the required ones first, each part in the order of the names.
        Raises: RequestError for tools without a function, an unknown name or a wrong schema of a strict tool.
        """
        functions = list(_functions(tools))
        if choice not in ("auto", "required"):
            functions = [(place, function) for place, function in functions if function["name"] == choice]
            if not functions:
                raise RequestError(f"tool_choice: expected auto, required or a declared tool, got {shown(choice)}")
        one = not parallel or choice not in ("auto", "required")
        source = f"{_START}section\n{_section_rules(functions, one)}"
        return cls(source, "calls", calls=True, required=choice != "auto", repeats=not one)

    def or_calls(self, tools: Sequence[Mapping[str, Any]], *, parallel: bool = True) -> Grammar:
        """Return this grammar for content, with a section of calls that may come in place of the content.

        `tools`, `parallel` and errors as in `tools`.
        """
        content = self.source.removeprefix(_START)
        rules = _section_rules(list(_functions(tools)), one=not parallel)
        return replace(
            self, source=f"{_START}content | {SECTION_BEGIN} section\ncontent: {content}\n{rules}", calls=True
        )


def llguidance() -> ModuleType:
    """Return the library. Raises: RequestError where it is not installed."""
    try:
        import llguidance as library
    except ImportError:
        raise RequestError(
            "grammar: expected the package llguidance for JSON schemas and tools, got none installed",
            hint="pip install llguidance",
        ) from None
    return library


@contextmanager
def no_panic(place: str) -> Iterator[None]:
    """Make a panic inside the library, which is no `Exception` to Python, the error of one request.

    Seen with llguidance 1.9.1: a message about a wrong schema, cut in the middle of a character.
    Raises: RequestError naming `place`.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # no module has the class
            raise
        raise RequestError(f"{place}: expected what llguidance can read, got what makes it fail") from None


def limits() -> LLParserLimits:
    """Bound what the library may do: by its own rates 20 ms to build a lexer, 25 ms for a mask, 50 MB of states."""
    built: LLParserLimits = llguidance().LLParserLimits(
        max_items_in_row=4000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=250_000,
        max_lexer_states=25_000,
        max_grammar_size=200_000,
        verbose_errors=False,  # they would repeat the reply's text
    )
    return built


def reason(error: str) -> str:
    """Take what a user can use from an error of llguidance: not the source, of which we wrote most."""
    text = re.sub(r"^at \d+\(\d+\): ", "", error.partition("\n   1 | ")[0].partition("\n<")[0])
    text = " ".join(text.removeprefix("failed to compile JSON schema: ").replace('"%json"', "it").split())
    text = _PLAIN_WORDS.get(text, text)
    return text if len(text) <= _SHOWN_REASON else f"{text[: _SHOWN_REASON - 3]}..."


def _functions(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the functions that may be called, and where they stand in the request."""
    for index, tool in enumerate(expand_builtins(tools, thinking=False) or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]:
            yield f"tools[{index}].function", function


def _section_rules(functions: Sequence[tuple[str, Mapping[str, Any]]], one: bool) -> str:
    """Write the rules of a section of calls, from behind its first token. Raises: RequestError."""
    if not functions:
        raise RequestError("tools: expected at least one function, got none")
    lines = [
        f"section: call{'' if one else '+'} {SECTION_END}",
        "call: " + " | ".join(f"call_{number}" for number in range(len(functions))),
        "NUMBER: /0|[1-9][0-9]{0,3}/",
    ]
    for number, (place, function) in enumerate(functions):
        name = json.dumps(f"functions.{function['name']}:")
        lines.append(f"call_{number}: {CALL_BEGIN} {name} NUMBER {ARGUMENT_BEGIN} arguments_{number} {CALL_END}")
        lines.append(f"arguments_{number}: {_arguments_rule(function, place)}")
    rules = "\n".join(lines) + "\n"
    if len(rules) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"tools: expected schemas of at most {MAX_GRAMMAR_CHARACTERS} characters together, got {len(rules)}"
        )
    return rules


def _arguments_rule(function: Mapping[str, Any], place: str) -> str:
    strict = function.get("strict") is True
    place = f"{place}.parameters"
    try:
        parameters = function.get("parameters")
        if not isinstance(parameters, (Mapping, type(None))):
            raise RequestError(f"{place}: expected a JSON schema, got {shown(parameters)}")
        schema = _copy_json(parameters or {}, place, 0, as_declared=True)
        if schema.setdefault("type", "object") != "object":
            raise RequestError(f'{place}.type: expected "object", got {shown(schema["type"])}')
        return _valid_rule(schema, _OPTIONS if strict else _TOLERANT, place)
    except RequestError:
        if strict:
            raise
        return _valid_rule(_ANY_OBJECT, _OPTIONS, place)


def _valid_rule(schema: Mapping[str, Any], options: Mapping[str, Any], place: str) -> str:
    """Write the rule of a schema. Raises: RequestError where llguidance does not take it."""
    try:
        text = json.dumps({**schema, "x-guidance": options}, allow_nan=False)
    except ValueError as error:
        raise RequestError(f"{place}: expected JSON data: {error}") from None
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise RequestError(f"{place}: expected at most {MAX_SCHEMA_CHARACTERS} characters, got {len(text)}")
    rule = f"%json {text}"
    with no_panic(place):
        wrong, messages = llguidance().LLMatcher.validate_grammar_with_warnings(
            f"{_HEADER}start: {rule}", None, limits=limits()
        )
    if wrong:
        raise RequestError(f"{place}: expected a JSON schema that can be enforced, got: {reason(messages[0])}")
    return rule


def _copy_json(value: Any, place: str, depth: int, as_declared: bool = False) -> Any:
    """Copy JSON data within the bounds; `as_declared` puts properties into the order of the tools' declaration."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{place}: expected at most {MAX_DEPTH} levels of nesting, got more")
    if isinstance(value, Mapping):
        if len(value) > MAX_MEMBERS:
            raise RequestError(f"{place}: expected at most {MAX_MEMBERS} members of an object, got {len(value)}")
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{place}: expected keys that are text, got {shown(list(value))}")
        copied = {key: _copy_json(item, f"{place}.{key}"[:200], depth + 1, as_declared) for key, item in value.items()}
        return _in_declared_order(copied) if as_declared else copied
    if isinstance(value, (list, tuple)):
        return [_copy_json(item, place, depth + 1, as_declared) for item in value]
    if value is not None and not isinstance(value, (str, int, float)):
        raise RequestError(f"{place}: expected JSON data, got {shown(value)}")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise RequestError(f"{place}: expected integers of at most {MAX_BITS} bits, got one of {value.bit_length()}")
    return value


def _in_declared_order(schema: dict[str, Any]) -> dict[str, Any]:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return schema
    first = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    names = sorted(properties, key=lambda name: (name not in first, name))
    return {**schema, "properties": {name: properties[name] for name in names}}
