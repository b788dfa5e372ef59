"""The interactive chat: read a message or a command, answer, go on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hybrid_k2.cli.chat.backend import Backend
from hybrid_k2.cli.chat.commands import COMMANDS, help_lines, parse_command
from hybrid_k2.cli.chat.conversation import Conversation, Message, load_conversation, save_conversation
from hybrid_k2.cli.chat.files import path_of, target_of
from hybrid_k2.cli.chat.line_input import PROMPT, LineInput, Typed
from hybrid_k2.cli.chat.media import Attached, attach, content_of, require_sight
from hybrid_k2.cli.chat.options import ChatOptions, check_text
from hybrid_k2.cli.chat.reply import kept_message, make_reply
from hybrid_k2.cli.chat.reply_view import ReplyView, say_figures
from hybrid_k2.cli.chat.statistics import Statistics
from hybrid_k2.cli.exits import say_error
from hybrid_k2.cli.state import state_folder
from hybrid_k2.cli.streams import OutputError
from hybrid_k2.cli.terminal import Output
from hybrid_k2.errors import HybridK2Error

WELCOME = "Type a message; /help lists the commands, Ctrl-D leaves."


class Leave(Exception):  # noqa: N818  (not an error)
    """The user leaves the chat."""


class ChatSession:
    """A chat with one backend; what is said about it goes to the notes, what the model says to the answer."""

    def __init__(
        self,
        backend: Backend,
        options: ChatOptions,
        answer: Output,
        notes: Output,
        keyboard: LineInput,
        attached: Sequence[Attached] = (),
    ) -> None:
        self.backend = backend
        self.options = options
        self.conversation = Conversation(options.system)
        self.thinking = options.thinking
        self._answer = answer
        self._notes = notes
        self._keyboard = keyboard
        self._attached = [*attached]  # for the next message
        self._statistics = Statistics()
        self._file: Path | None = None  # where this conversation was saved or loaded: saving there again is no surprise
        self._again = 0  # how often the last message was answered again
        self._commands = {command.name: getattr(self, f"_{command.name}") for command in COMMANDS}

    def run(self) -> None:
        """Chat until the user leaves. An error of one message is said, and the chat goes on as if it had not been."""
        self._notes.line(WELCOME, "dim")
        self._say_attached(self._attached)
        while True:
            try:
                typed = self._next()
                if typed is None:
                    return
                self._take(typed)
            except HybridK2Error as error:
                say_error(self._notes, error)
            except KeyboardInterrupt:
                # It never leaves: one that comes just after the end of a reply was meant to stop the reply.
                self._notes.line("\n(Ctrl-D or /exit leaves)", "dim")
            except Leave:
                return
            except Exception:  # a bug, or a terminal that is gone: the chat ends, but not with what was said in it
                self._rescue()
                raise

    def _next(self) -> Typed | None:
        try:
            return self._keyboard.read()
        except EOFError:
            self._notes.line()
            return None

    def _take(self, typed: Typed) -> None:
        if not typed.text.strip():
            return
        command = None if typed.block else parse_command(typed.text)
        if command is not None:
            self._commands[command.name](command.argument)
            return
        text = check_text(typed.text, "message").rstrip().strip("\n")
        if not typed.block and text.lstrip().startswith("/"):
            text = text.lstrip()  # the space that made it a message
        self._again = 0
        self._answer_to([*self.conversation.messages, {"role": "user", "content": content_of(text, self._attached)}])
        self._attached.clear()  # not before: a message that is refused can be sent again
        self._answer_calls()

    def _answer_to(self, messages: list[Message], again: int = 0) -> None:
        """Answer messages, and keep them with the reply."""
        prompt = Conversation(self.conversation.system, messages).prompt()
        view = ReplyView(self._answer, self._notes)
        reply = make_reply(self.backend, prompt, self._options_now(again), view)
        self.conversation.messages = [*messages, kept_message(reply)]
        self._statistics.add(reply)
        say_figures(reply, self._notes)
        self._notes.line()

    def _answer_calls(self, again: int = 0) -> None:
        """Ask for the results of tools that the model calls, and answer them, until it calls none."""
        while results := self._tool_results():
            self._answer_to([*self.conversation.messages, *results], again)

    def _options_now(self, again: int) -> ChatOptions:
        options, params = replace(self.options, thinking=self.thinking), self.options.params
        if again and params.seed is not None:  # the same seed would give the same words again
            options = replace(options, params=replace(params, seed=(params.seed + again) % 2**63))
        return options

    def _tool_results(self) -> list[Message]:
        """Ask the user, who is the tool here, for the result of each call; nothing if one is left empty."""
        results: list[Message] = []
        for call in self.conversation.open_tool_calls():
            if not results:
                self._notes.line("What does the tool return? (an empty line: nothing)", "dim")
            try:
                text = self._keyboard.read(f"{call['function']['name']}{PROMPT}").text
            except EOFError:
                text = ""
            if not text.strip():
                return []
            results.append({"role": "tool", "tool_call_id": call["id"], "content": check_text(text, "tool result")})
        return results

    def _help(self, _: str) -> None:
        lines = help_lines()
        width = max(len(left) for left, _ in lines)
        for left, right in lines:
            self._notes.write(f"  {left:{width}}  ", "bold")
            self._notes.line(right)

    def _think(self, argument: str) -> None:
        if argument:
            self.thinking = argument.lower() == "on"
        self._notes.line(f"thinking is {'on' if self.thinking else 'off'}", "dim")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.system = None if argument.lower() == "off" else check_text(argument, "system prompt")
        shown = self.conversation.system
        self._notes.line("there is no system prompt" if shown is None else f"system prompt: {shown}", "dim")

    def _image(self, argument: str) -> None:
        self._attach("image", argument)

    def _video(self, argument: str) -> None:
        self._attach("video", argument)

    def _attach(self, medium: str, argument: str) -> None:
        if argument.lower() == "off":
            self._attached = [one for one in self._attached if one.medium != medium]
        elif argument:
            require_sight(self.backend.sees, medium, self.backend.model, f"/{medium}")
            self._attached.append(attach(medium, path_of(argument)))
            self._say_attached(self._attached[-1:])
            return
        of_medium = [one for one in self._attached if one.medium == medium]
        if not of_medium:
            self._notes.line(f"no {medium} goes with the next message", "dim")
        self._say_attached(of_medium)

    def _say_attached(self, attached: Sequence[Attached]) -> None:
        for one in attached:
            self._notes.line(f"with the next message: {one}", "dim")

    def _clear(self, _: str) -> None:
        self.conversation = Conversation(self.conversation.system)
        self._file = None
        self._notes.line("the conversation is forgotten", "dim")

    def _regen(self, _: str) -> None:
        messages = self.conversation.before_last_reply()
        self._again += 1
        self._answer_to(messages, self._again)
        self._answer_calls(self._again)

    def _save(self, argument: str) -> None:
        path = path_of(argument)
        target = target_of(path)
        if target.exists() and target != self._file and not self._keyboard.ask(f"{path} exists; replace it?"):
            self._notes.line("not saved", "dim")
            return
        save_conversation(target, self.conversation, model=self.backend.model, thinking=self.thinking)
        self._file = target
        self._notes.line(f"saved {self._size()} to {path}", "dim")

    def _load(self, argument: str) -> None:
        path = path_of(argument)
        self.conversation, self.thinking = load_conversation(path)
        self._file, self._again = target_of(path), 0
        self._notes.line(f"loaded {self._size()} from {path}; thinking is {'on' if self.thinking else 'off'}", "dim")

    def _stats(self, _: str) -> None:
        for name, value in self._statistics.lines(self.backend):
            self._notes.write(f"  {name:18}", "bold")
            self._notes.line(value)

    def _rescue(self) -> None:
        """Save the conversation where the user did not ask for it, and say where."""
        if not self.conversation.messages:
            return
        try:
            path = state_folder() / f"rescued-{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}.json"
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            save_conversation(path, self.conversation, model=self.backend.model, thinking=self.thinking)
            said = f"the conversation is saved; to go on with it: /load {path}"
        except (HybridK2Error, OSError) as error:
            said = f"the conversation cannot be saved: {error}"
        with suppress(OutputError):
            self._notes.line(said, "warning")

    def _exit(self, _: str) -> None:
        raise Leave

    def _size(self) -> str:
        count = len(self.conversation.messages)
        return f"{count} message{'' if count == 1 else 's'}"
