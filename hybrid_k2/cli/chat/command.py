"""The command `chat`: its options, and which way it goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_k2.cli.exits import ends_cleanly
from hybrid_k2.cli.interrupts import leaving_at_once
from hybrid_k2.cli.options import memory_size, trace_file
from hybrid_k2.cli.terminal import Nowhere, Output

if TYPE_CHECKING:
    from hybrid_k2.cli.chat.backend import Backend
    from hybrid_k2.cli.chat.media import Attached
    from hybrid_k2.cli.chat.options import ChatOptions

    OpenBackend = Callable[[Output], Backend]
_REPLY = "The reply"
_SERVER = "A model that a server runs"
_SAMPLING = "Sampling (left out: what the model recommends)"


def _reply(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=_REPLY)


def _server(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=_SERVER)


def _sampling(name: str, text: str) -> Any:
    return typer.Option(name, metavar="NUMBER", help=text, rich_help_panel=_SAMPLING)


@ends_cleanly
def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH_OR_REPO_ID",
            help="A checkpoint folder, a repository like moonshotai/Kimi-K2.6, or demo, the built-in model (also "
            "left out). With --server: the name of a model there.",
        ),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option("--rules", metavar="FILE|NAME", help="Placement rules (left out: chosen for the machine)."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and exit; - is stdin. Repeat to join texts."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="An image for the (first) message. Repeat for more."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", metavar="FILE", help="A video for the (first) message. Repeat for more."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; needs a prompt or --dry-run.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print the plan and exit: no weights are loaded or need be here."
        ),
    ] = False,
    host_memory: Annotated[
        str | None,
        typer.Option("--host-memory", metavar="SIZE", help="Plan for a host with this much free, with --dry-run."),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option("--trace", metavar="FILE", help="At the end, write what computed when, for Chrome or Perfetto."),
    ] = None,
    server: Annotated[
        str | None, _server("--server", "URL", "Chat with the model of this server: http://, https:// or unix:PATH.")
    ] = None,
    api_key: Annotated[
        str | None,
        _server("--api-key", "KEY", "Its key. Others can read it here: prefer HYBRID_K2_API_KEY, or a file."),
    ] = None,
    api_key_file: Annotated[
        Path | None, _server("--api-key-file", "FILE", "A file with its key, on the first line that is no # comment.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on stderr but errors.")] = False,
    system: Annotated[str | None, _reply("--system", "TEXT", "The system prompt.")] = None,
    think: Annotated[
        bool, typer.Option("--think/--no-think", help="Think before the answer.", rich_help_panel=_REPLY)
    ] = True,
    tools: Annotated[
        Path | None,
        _reply("--tools", "FILE", "Tools that the model may call: a JSON list of declarations."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        _reply("--max-tokens", "N", "The longest reply, thinking included (left out: what the context holds)."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        _reply("--stop", "TEXT", "End the answer before this text. Repeat for more."),
    ] = None,
    temperature: Annotated[float | None, _sampling("--temperature", "0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, _sampling("--top-p", "Keep the likeliest tokens up to this sum.")] = None,
    top_k: Annotated[int | None, _sampling("--top-k", "Keep this many tokens; 0 keeps all.")] = None,
    min_p: Annotated[
        float | None,
        _sampling("--min-p", "Drop tokens less likely than this share of the likeliest."),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        _sampling("--presence-penalty", "-2 to 2: against tokens that the reply has."),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        _sampling("--frequency-penalty", "-2 to 2: the same, for each time."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        _sampling("--repetition-penalty", "Above 1: against tokens of prompt and reply."),
    ] = None,
    seed: Annotated[int | None, _sampling("--seed", "The same seed gives the same text.")] = None,
) -> None:
    """Chat with a model; with --prompt or piped text, answer once and exit."""
    address = None
    if server is None:
        for option, value in (("--api-key", api_key), ("--api-key-file", api_key_file)):
            if value is not None:
                raise typer.BadParameter("expected --server beside it", param_hint=option)
    else:
        from hybrid_k2.cli.remote.address import read_address

        here = {"--rules": rules, "--dry-run": dry_run, "--host-memory": host_memory, "--trace": trace}
        _refuse_beside("--server", here)
        address = read_address(server)
    if api_key is not None:
        _refuse_beside("--api-key", {"--api-key-file": api_key_file})
    interactive = not prompt and sys.stdin is not None and sys.stdin.isatty()
    if host_memory is not None and not dry_run:
        raise typer.BadParameter("expected --dry-run beside it", param_hint="--host-memory")
    if as_json and interactive and not dry_run:
        raise typer.BadParameter("expected --prompt TEXT or text on standard input", param_hint="--json")
    if rules is not None and not rules.strip():
        raise typer.BadParameter("expected a rule file or a name, got an empty text", param_hint="--rules")
    trace_to = trace_file(trace)
    host_memory_bytes = None if host_memory is None else memory_size(host_memory, "--host-memory")

    with leaving_at_once():
        from hybrid_k2.cli.api_keys import own_key
        from hybrid_k2.cli.chat.backend import load_backend
        from hybrid_k2.cli.chat.media import attach, check_attached
        from hybrid_k2.cli.chat.options import ChatOptions, check_text, read_tools
        from hybrid_k2.cli.remote.backend import connect
        from hybrid_k2.engine.params import SamplingParams

    checkpoint = "demo" if model is None else model
    given = {"image": image, "video": video}
    attached = [attach(medium, path) for medium, paths in given.items() for path in paths or ()]
    open_backend: OpenBackend
    if address is None:
        if attached:
            check_attached(attached, checkpoint)
        open_backend = partial(load_backend, checkpoint, rules, trace_to)
    else:
        open_backend = partial(
            connect,
            address,
            own_key(api_key, api_key_file),
            model,
            [medium for medium, paths in given.items() if paths],
        )
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        max_tokens=max_tokens,
    )
    options = ChatOptions(
        params=params,
        system=None if system is None else check_text(system, "--system"),
        tools=None if tools is None else read_tools(tools),
        thinking=think,
    )
    notes = Output(Nowhere() if quiet else sys.stderr)
    if dry_run:
        _plan(checkpoint, rules, prompt or [], trace_to, host_memory_bytes, as_json)
    elif interactive:
        _chat(open_backend, options, attached, notes)
    else:
        _answer(open_backend, options, prompt or [], attached, notes, as_json)


def _refuse_beside(other: str, given: Mapping[str, object]) -> None:
    """Refuse options that mean nothing beside another one. Raises: typer.BadParameter naming both."""
    for option, value in given.items():
        if value not in (None, False):
            raise typer.BadParameter(f"expected no {other} beside it", param_hint=option)


def _plan(
    model: str,
    rules: str | None,
    prompt: list[str],
    trace: Path | None,
    host_memory_bytes: int | None,
    as_json: bool,
) -> None:
    with leaving_at_once():
        from hybrid_k2.cli.chat.dry_run import show_plan
        from hybrid_k2.cli.chat.one_shot import check_parts

    check_parts(prompt)
    show_plan(model, rules, trace, host_memory_bytes, Output(sys.stdout), as_json)


def _chat(open_backend: OpenBackend, options: ChatOptions, attached: list[Attached], notes: Output) -> None:
    with leaving_at_once():
        from hybrid_k2.cli.chat.line_input import LineInput
        from hybrid_k2.cli.chat.session import ChatSession

    with closing(open_backend(notes)) as backend:
        notes = Output(sys.stderr)  # --quiet is for the loading: a chat without its prompts would be none
        ChatSession(backend, options, Output(sys.stdout), notes, LineInput(notes), attached).run()


def _answer(
    open_backend: OpenBackend,
    options: ChatOptions,
    prompt: list[str],
    attached: list[Attached],
    notes: Output,
    as_json: bool,
) -> None:
    with leaving_at_once():
        from hybrid_k2.cli.chat.media import content_of
        from hybrid_k2.cli.chat.one_shot import answer_once, prompt_text

    text = prompt_text(prompt, notes)
    with closing(open_backend(notes)) as backend:
        answer_once(backend, options, content_of(text, attached), Output(sys.stdout), notes, as_json)
