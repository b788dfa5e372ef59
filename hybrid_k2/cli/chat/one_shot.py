"""One answer: the prompt from an option or a pipe, the answer to stdout, all else to stderr."""

from __future__ import annotations

import fcntl
import json
import sys
import termios
from contextlib import closing
from typing import TYPE_CHECKING, Any

from hybrid_k2.cli.chat.backend import Backend
from hybrid_k2.cli.chat.conversation import Conversation
from hybrid_k2.cli.chat.options import ChatOptions, check_text
from hybrid_k2.cli.chat.reply_view import ReplyView, say_figures
from hybrid_k2.cli.terminal import Output
from hybrid_k2.errors import RequestError

if TYPE_CHECKING:
    from hybrid_k2.engine import Reply

STDIN = "-"


def prompt_text(parts: list[str], notes: Output) -> str:
    """Return the prompt: the parts with a blank line between them, where `-` stands for stdin; without parts, stdin.

    Stdin is read only if it is asked for, so that a program that leaves it open cannot make the chat wait.
    Raises: RequestError: a part is empty or not UTF-8.
    """
    if not parts:
        return check_text(_read_stdin(), "standard input")
    check_parts(parts)
    texts = [check_text(_read_stdin(), "standard input") if part == STDIN else part for part in parts]
    if STDIN not in parts and _stdin_waits():
        notes.line("note: standard input is not read; --prompt - adds it to the prompt", "dim")
    return "\n\n".join(text.strip("\n") for text in texts)


def check_parts(parts: list[str]) -> None:
    """Check what of a prompt can be checked before stdin is read.

    Raises: RequestError: a part is empty or not UTF-8, or more than one stands for stdin.
    """
    if parts.count(STDIN) > 1:
        raise RequestError(f"--prompt: expected {STDIN} once, got it {parts.count(STDIN)} times")
    for part in parts:
        if part != STDIN:
            check_text(part, "--prompt")


def answer_once(
    backend: Backend,
    options: ChatOptions,
    content: str | list[dict[str, Any]],
    answer: Output,
    notes: Output,
    as_json: bool,
) -> None:
    """Answer a prompt, a text or one with images, streaming, or as one JSON object.

    Raises: HybridK2Error; KeyboardInterrupt on Ctrl-C.
    """
    view = ReplyView(answer, notes)
    messages = Conversation(options.system, [{"role": "user", "content": content}]).prompt()
    with closing(backend.start(messages, options, view.show_prefill)) as stream:
        try:
            for event in stream:
                if not as_json:
                    view.show(event)
        finally:
            view.finish()
        reply = stream.reply
    if as_json:
        answer.line(json.dumps(as_object(reply, backend.model), ensure_ascii=False))
    else:
        say_figures(reply, notes)


def as_object(reply: Reply, model: str) -> dict[str, Any]:
    """Return what `--json` prints."""
    fields = reply.to_dict()
    return {"model": model, "text": fields.pop("content"), **fields}


def _read_stdin() -> str:
    if sys.stdin is None:
        raise RequestError("standard input: expected text, got a closed stream", hint="give the text with --prompt")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"standard input: expected UTF-8 text, got byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error


def _stdin_waits() -> bool:
    """Say whether stdin is a pipe or a file with something in it; none of it is taken."""
    try:
        if sys.stdin.isatty():
            return False
        count = fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(count, sys.byteorder) > 0
    except (AttributeError, OSError, ValueError):  # no stdin, or one that cannot tell
        return False
