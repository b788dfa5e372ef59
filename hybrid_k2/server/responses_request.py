"""The body of OpenAI's Responses API, and what it becomes: the messages, tools and parameters of a chat.

Nothing is stored: a conversation comes whole with each request, its reasoning, calls and their outputs among the items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

from hybrid_k2.engine.params import MAX_LOGPROBS
from hybrid_k2.errors import shown
from hybrid_k2.server.body import AnyObject, Body, check_fields, text_field
from hybrid_k2.server.errors import bad_request
from hybrid_k2.server.images import FILE_SCHEME, check_detail, image_part
from hybrid_k2.server.sampling import CacheSalt, SamplingFields
from hybrid_k2.server.thinking import Thinking, read_thinking

Input = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]})]
_TOOL_FIELDS = frozenset({"type", "name", "description", "parameters", "strict"})
_ITEM_FIELDS = {
    "message": {"role", "content", "phase"},
    "reasoning": {"summary", "content", "encrypted_content"},
    "function_call": {"call_id", "name", "arguments"},
    "function_call_output": {"call_id", "output"},
}
_EVERY_ITEM = {"type", "id", "status"}
_TEXT_TYPES = ("input_text", "output_text", "reasoning_text", "summary_text", "text")
_TEXT_FIELDS = {"type", "text", "annotations", "logprobs"}
_IMAGE_FIELDS = {"type", "image_url", "file_id", "detail"}
_LOGPROBS = "message.output_text.logprobs"
# Reasoning comes in the clear, so that a client that asks for its sealed form can send it back just as well.
_INCLUDED = (_LOGPROBS, "reasoning.encrypted_content")


# What a chat calls its parameters, and what they are called here.
OWN_NAMES = {
    r"(tools\[\d+\])\.function(?=\.)": r"\1",
    r"tool_choice\.function\.name": "tool_choice.name",
    r"response_format(\.json_schema)?": "text.format",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
    "max_tokens": "max_output_tokens",
}


class ResponsesRequest(Body):
    """The body of a request for a response."""

    input: Input
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    reasoning: AnyObject = None
    text: AnyObject = None
    include: list[str] | None = None
    stream: bool = False
    cache_salt: CacheSalt = ""
    # Names for the client's own books, without effect on the reply.
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # What would be kept between requests.
    previous_response_id: str | None = None
    conversation: Any = None
    # Fields with one value that this server can give.
    store: bool = False
    background: bool = False
    truncation: str = "disabled"
    service_tier: str = "auto"

    def check_fixed(self) -> None:
        """Refuse what this server does not do. Raises: ApiError."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise bad_request(
                    name, "expected none: this server keeps nothing; send the whole conversation as input"
                )
        if self.store:
            raise bad_request("store", "expected false: this server keeps no responses, got true")
        if self.background:
            raise bad_request("background", "expected false, got true")
        if self.truncation != "disabled":
            raise bad_request("truncation", f"expected disabled, got {shown(self.truncation)}")
        if self.service_tier not in ("auto", "default"):
            raise bad_request("service_tier", f"expected auto or default, got {shown(self.service_tier)}")
        for index, name in enumerate(self.include or []):
            if name not in _INCLUDED:
                raise bad_request(f"include[{index}]", f"expected one of {', '.join(_INCLUDED)}, got {shown(name)}")

    def read_thinking(self) -> Thinking:
        """Return whether the model thinks. Raises: ApiError."""
        reasoning = {} if self.reasoning is None else self.reasoning
        if not isinstance(reasoning, Mapping):
            raise bad_request("reasoning", f"expected an object, got {shown(reasoning)}")
        for name, value in reasoning.items():
            # A summary would have to be made; the reasoning itself is in the response.
            if name != "effort" and not (name == "summary" and value in (None, "auto")):
                raise bad_request(f"reasoning.{name}", f"expected no such field or value, got {shown(value)}")
        return Thinking(read_thinking(reasoning_effort=reasoning.get("effort")).on, keep=True)

    def top_k_logprobs(self) -> int | None:
        """Return how many alternatives of each token to report; None for no log probabilities. Raises: ApiError."""
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise bad_request("top_logprobs", f"expected 0 to {MAX_LOGPROBS}, got {shown(self.top_logprobs)}")
        if _LOGPROBS in (self.include or []):
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise bad_request("top_logprobs", f"expected include to have {_LOGPROBS} beside it")
        return None

    def sampling(self) -> SamplingFields:
        """Return the parameters of sampling."""
        return SamplingFields(temperature=self.temperature, top_p=self.top_p)

    def response_format(self) -> Any:
        """Return the `response_format` of a chat. Raises: ApiError."""
        text = {} if self.text is None else self.text
        if not isinstance(text, Mapping):
            raise bad_request("text", f"expected an object, got {shown(text)}")
        for name, value in text.items():
            if name != "format" and not (name == "verbosity" and value in (None, "medium")):
                raise bad_request(f"text.{name}", f"expected no such field or value, got {shown(value)}")
        wanted = text.get("format")
        if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
            return wanted
        return {"type": "json_schema", "json_schema": {name: wanted[name] for name in wanted if name != "type"}}

    def chat_tools(self) -> list[dict[str, Any]]:
        """Return the declarations of tools. Raises: ApiError."""
        return [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or [])]

    def chat_tool_choice(self) -> Any:
        """Return the tool choice of a chat."""
        choice = self.tool_choice
        if isinstance(choice, Mapping) and choice.get("type") == "function" and choice.keys() == {"type", "name"}:
            return {"type": "function", "function": {"name": choice["name"]}}
        return choice

    def chat_messages(self) -> list[dict[str, Any]]:
        """Return the messages of a chat: neighbouring items of the assistant are one message. Raises: ApiError."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        if not isinstance(self.input, list):
            raise bad_request("input", f"expected a text or a list of items, got {shown(self.input)}")
        turn: dict[str, Any] | None = None  # the assistant's, while its items come
        for index, item in enumerate(self.input):
            message = _read_item(item, f"input[{index}]")
            if message["role"] != "assistant":
                turn = None
                messages.append(message)
            elif turn is None or ((turn.get("content") or turn.get("tool_calls")) and "reasoning_content" in message):
                turn = message
                messages.append(message)
            else:
                _join(turn, message)
        return messages


def _join(turn: dict[str, Any], more: dict[str, Any]) -> None:
    for name in ("reasoning_content", "content"):
        if more.get(name):
            turn[name] = turn.get(name, "") + more[name]
    if more.get("tool_calls"):
        turn["tool_calls"] = [*turn.get("tool_calls", []), *more["tool_calls"]]


def _read_item(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise bad_request(place, f"expected an object, got {shown(item)}")
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _ITEM_FIELDS:
        raise bad_request(f"{place}.type", f"expected one of {', '.join(_ITEM_FIELDS)}, got {shown(kind)}")
    check_fields(item, _EVERY_ITEM | _ITEM_FIELDS[kind], place, f"an item of type {kind}")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise bad_request(f"{place}.role", f"expected user, assistant, system or developer, got {shown(role)}")
        read = _joined if role == "assistant" else _content
        return {"role": role, "content": read(item.get("content"), f"{place}.content")}
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        return {"role": "assistant", "content": "", "reasoning_content": _joined(parts, f"{place}.content")}
    call_id = text_field(item, "call_id", place)
    if kind == "function_call":
        function = {"name": text_field(item, "name", place), "arguments": text_field(item, "arguments", place)}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        }
    return {"role": "tool", "tool_call_id": call_id, "content": _content(item.get("output"), f"{place}.output")}


def _joined(content: Any, place: str) -> str:
    """Return content as one text. Raises: ApiError, also for an image."""
    return "".join(_read_text(part, here) for part, here in _parts(content, place))


def _content(content: Any, place: str) -> str | list[dict[str, Any]]:
    """Return content as one text, or as parts where there is an image. Raises: ApiError."""
    given = list(_parts(content, place))
    if not any(part.get("type") == "input_image" for part, _ in given):
        return "".join(_read_text(part, here) for part, here in given)
    return [
        _read_image(part, here)
        if part.get("type") == "input_image"
        else {"type": "text", "text": _read_text(part, here)}
        for part, here in given
    ]


def _parts(content: Any, place: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the parts of content, each with its place. Raises: ApiError."""
    if isinstance(content, str):
        yield {"type": "text", "text": content}, place
        return
    if not isinstance(content, list):
        raise bad_request(place, f"expected a text or a list of parts, got {shown(content)}")
    for number, part in enumerate(content):
        here = f"{place}[{number}]"
        if not isinstance(part, Mapping):
            raise bad_request(here, f"expected an object, got {shown(part)}")
        yield part, here


def _read_text(part: Mapping[str, Any], place: str) -> str:
    if part.get("type") not in _TEXT_TYPES:
        raise bad_request(f"{place}.type", f"expected a text, got {shown(part.get('type'))}")
    check_fields(part, _TEXT_FIELDS, place, "a text")
    return text_field(part, "text", place)


def _read_image(part: Mapping[str, Any], place: str) -> dict[str, Any]:
    check_fields(part, _IMAGE_FIELDS, place, "an image")
    check_detail(part.get("detail"), place)
    url, file_id = part.get("image_url"), part.get("file_id")
    if (url is None) is (file_id is None):
        raise bad_request(place, f"expected image_url or file_id, got {'neither' if url is None else 'both'}")
    if file_id is None:
        return image_part(url, f"{place}.image_url")
    return image_part(FILE_SCHEME + text_field(part, "file_id", place), f"{place}.file_id")


def _read_tool(tool: Any, place: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise bad_request(place, f"expected an object, got {shown(tool)}")
    if tool.get("type") != "function":
        raise bad_request(
            f"{place}.type", f"expected function: the client runs all tools, got {shown(tool.get('type'))}"
        )
    check_fields(tool, _TOOL_FIELDS, place, "a tool")
    function = {
        name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None
    }
    return {"type": "function", "function": function}
