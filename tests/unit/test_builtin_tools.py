"""Tools that the hosted API knows by name."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid_k2.errors import RequestError
from hybrid_k2.protocol import OutputParser, call_type, declare_tools, expand_builtins
from tests.protocol_strategies import small_tokenizer

SEARCH = {"type": "builtin_function", "function": {"name": "$web_search"}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def test_the_model_reads_an_ordinary_function() -> None:
    tools = expand_builtins([CLOCK, SEARCH], thinking=False)
    assert tools is not None
    assert tools[0] is CLOCK
    declared = declare_tools(tools)
    assert "type $web_search = (_: {" in declared
    assert "query: string" in declared
    parser = OutputParser(small_tokenizer(), tools, thinking=False)
    text = '<|tool_call_begin|>functions.$web_search:0<|tool_call_argument_begin|>{"query": "x"}<|tool_call_end|>'
    assert {event.name for event in parser.feed_text(text)} == {"$web_search"}


def test_calls_have_the_type_that_the_tool_was_declared_with() -> None:
    assert (call_type("$web_search"), call_type("clock")) == ("builtin_function", "function")


@pytest.mark.parametrize("function", [{"name": "$code_runner"}, {"name": 7}, {}, None, {"name": "x" * 10**6}])
def test_unknown_builtins_are_refused(function: Any) -> None:
    with pytest.raises(RequestError, match=r"tools\[1\].function.name: expected one of \$web_search, got") as error:
        expand_builtins([CLOCK, {"type": "builtin_function", "function": function}], thinking=False)
    assert len(error.value.message) < 300


def test_thinking_must_be_off() -> None:
    with pytest.raises(RequestError, match=r"tools\[0\]: expected thinking to be off"):
        expand_builtins([SEARCH], thinking=True)


@pytest.mark.parametrize("tools", [None, [], "text", {"a": 1}, 7, [7, None]])
def test_what_is_no_list_of_tools_is_left_to_be_refused(tools: Any) -> None:
    assert expand_builtins(tools, thinking=True) == tools
