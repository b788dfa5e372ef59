"""Make one reply: stream it to a view until it ends or the user stops it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_k2.cli.chat.conversation import Message
from hybrid_k2.cli.chat.interrupt import no_echo, on_ctrl_c
from hybrid_k2.cli.chat.options import ChatOptions
from hybrid_k2.cli.chat.reply_view import ReplyView

if TYPE_CHECKING:
    from hybrid_k2.engine import Engine, Generation, Reply

CANCELLED = "cancelled"


def start_reply(engine: Engine, messages: list[Message], options: ChatOptions, view: ReplyView) -> Generation:
    """Ask for a reply with the chat's options; nothing is computed before its first event. Raises: RequestError."""
    return engine.generate(
        messages=messages,
        tools=options.tools,
        thinking=options.thinking,
        params=options.params,
        on_prefill=view.show_prefill,
    )


def make_reply(engine: Engine, messages: list[Message], options: ChatOptions, view: ReplyView) -> Reply:
    """Generate a reply to messages; Ctrl-C stops it, and what came until then is the reply.

    Raises: RequestError: the messages cannot be answered; nothing was generated.
    """
    generation = start_reply(engine, messages, options, view)
    try:
        with on_ctrl_c(generation.cancel), no_echo():
            for event in generation:
                view.show(event)
    except KeyboardInterrupt:
        generation.close()
    finally:
        reply = generation.reply
        view.finish(stopped=reply.finish_reason == CANCELLED)
    return reply


def kept_message(reply: Reply) -> Message:
    """Return the message of a reply for the conversation; one that was stopped is marked."""
    message = reply.message()
    return message | {"stopped": True} if reply.finish_reason == CANCELLED else message
