"""From token ids to what a reader sees: stop strings in the content, the text of the whole reply."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_k2.engine.output import Output, PlainText
from hybrid_k2.engine.reply import ToolCall
from hybrid_k2.protocol import Event, Tokenizer
from tests.generators import write_tokenizer


class Scripted:
    """A parser whose events are given beforehand: the n-th id stands for the n-th list."""

    def __init__(self, *script: list[Event], last: Iterable[Event] = ()) -> None:
        self.script, self.last = script, list(last)

    def feed(self, token_ids: Iterable[int]) -> list[Event]:
        return [event for token in token_ids for event in self.script[token]]

    def finish(self) -> list[Event]:
        return self.last


def call(index: int, *, end: bool = True) -> list[Event]:
    events = [
        Event("tool_call_begin", index=index, id=f"functions.f:{index}", name="f"),
        Event("tool_call_arguments", '{"a": "STOP', index=index),
        Event("tool_call_arguments", '"}', index=index),
    ]
    return [*events, Event("tool_call_end", index=index)] if end else events


def content(*texts: str) -> list[Event]:
    return [Event("content", text) for text in texts]


def test_a_stop_string_cuts_content_only() -> None:
    script = [Event("reasoning", "do not write STOP")], [*call(0), *content(" one ST")], content("OP two")
    output = Output(Scripted(*script), ["STOP"])
    events = output.feed([0, 1]) + output.feed([2]) + output.finish()
    assert events == [script[0][0], *call(0), *content(" one ")]
    assert (output.matched_stop, output.content, output.reasoning) == ("STOP", " one ", "do not write STOP")
    assert output.tool_calls == (ToolCall("functions.f:0", "f", '{"a": "STOP"}'),)


def test_nothing_follows_a_stop_string() -> None:
    output = Output(Scripted([*content("a STOP b"), *call(0)], last=content("c")), ["STOP"])
    assert output.feed([0]) + output.finish() == content("a ")
    assert output.tool_calls == ()


def test_text_held_back_comes_before_the_event_behind_it() -> None:
    output = Output(Scripted(content("wait ST"), call(0), content("OP")), ["STOP"])
    assert output.feed([0]) == content("wait ")
    assert output.feed([1]) == [*content("ST"), *call(0)]
    assert output.feed([2]) + output.finish() == content("OP")
    assert output.matched_stop is None
    assert output.content == "wait STOP"


def test_finish_gives_the_rest_and_looks_for_stop_strings_in_it() -> None:
    output = Output(Scripted(content("a ST"), last=content("O")), ["STOP"])
    output.feed([0])
    assert output.finish() == content("STO")
    output = Output(Scripted(content("a ST"), last=content("OP b")), ["STOP"])
    assert output.feed([0]) + output.finish() == content("a ")
    assert output.matched_stop == "STOP"


def test_an_incomplete_call_is_no_call() -> None:
    output = Output(Scripted(call(0), call(1, end=False)), [])
    output.feed([0, 1])
    assert [call.id for call in output.tool_calls] == ["functions.f:0"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = Path(tmp_path_factory.mktemp("tokenizer"))
    write_tokenizer(folder, 512)  # bytes alone, so that every character beyond ASCII is several tokens
    return Tokenizer.load(folder)


@settings(max_examples=100)
@given(text=st.text(alphabet="aé漢🙂\n", max_size=30), stop=st.text(alphabet="aé漢", min_size=1, max_size=3))
def test_stop_strings_are_found_across_tokens_and_bytes(tokenizer: Tokenizer, text: str, stop: str) -> None:
    output, shown = Output(PlainText(tokenizer), [stop]), ""
    for token in tokenizer.encode(text):
        for event in output.feed([token]):
            assert "\N{REPLACEMENT CHARACTER}" not in event.text
            shown += event.text
        assert output.matched_stop is None or text.startswith(shown + stop)
    shown += "".join(event.text for event in output.finish())
    assert shown == output.content == text.partition(stop)[0]
    assert (output.matched_stop == stop) == (stop in text)


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    output = Output(PlainText(tokenizer), [])
    assert output.feed(tokenizer.encode("a漢")[:-1]) == content("a")
    assert output.finish() == content("\N{REPLACEMENT CHARACTER}")
