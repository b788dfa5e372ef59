"""Make one reply: stream it to a view until it ends or the user stops it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybrid_k2.cli.chat.backend import CANCELLED, Backend
from hybrid_k2.cli.chat.conversation import Message
from hybrid_k2.cli.chat.interrupt import no_echo, on_ctrl_c
from hybrid_k2.cli.chat.options import ChatOptions
from hybrid_k2.cli.chat.reply_view import ReplyView

if TYPE_CHECKING:
    from hybrid_k2.engine import Reply


def make_reply(backend: Backend, messages: Sequence[Message], options: ChatOptions, view: ReplyView) -> Reply:
    """Generate a reply to messages; Ctrl-C stops it, and what came until then is the reply.

    Raises: HybridK2Error: the messages cannot be answered, or the answer broke off.
    """
    stream = backend.start(messages, options, view.show_prefill)
    try:
        with on_ctrl_c(stream.cancel), no_echo():
            for event in stream:
                view.show(event)
    except KeyboardInterrupt:
        stream.close()
    except BaseException:
        view.finish()
        raise
    reply = stream.reply
    view.finish(stopped=reply.finish_reason == CANCELLED)
    return reply


def kept_message(reply: Reply) -> Message:
    """Return the message of a reply for the conversation; one that was stopped is marked."""
    message = reply.message()
    return message | {"stopped": True} if reply.finish_reason == CANCELLED else message
