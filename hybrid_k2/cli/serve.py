"""The command `serve`: its options, and from there to a running server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid_k2.cli.api_keys import read_keys
from hybrid_k2.cli.config_file import use_config_file
from hybrid_k2.cli.exits import ends_cleanly
from hybrid_k2.cli.interrupts import leaving_at_once
from hybrid_k2.cli.options import memory_size
from hybrid_k2.cli.terminal import Output
from hybrid_k2.errors import ConfigError

if TYPE_CHECKING:
    from hybrid_k2.engine.service_types import ServiceOptions
    from hybrid_k2.server.backend import Served

MAX_VIDEOS = 4  # of one request; decoding one may take minutes
_LISTEN, _ACCESS, _LOAD, _LIMITS = "Where it listens", "Who may call", "How much runs at once", "Limits of requests"


def _option(name: str, metavar: str | None, text: str, panel: str | None = None, **more: Any) -> Any:
    variable = "HYBRID_K2_" + name.lstrip("-").replace("-", "_").upper()
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel, envvar=variable, **more)


def _seconds(name: str, text: str, panel: str) -> Any:
    """Return an option for a time of at most a day."""
    return _option(name, "SECONDS", text, panel, min=0, max=86_400)


@ends_cleanly
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_REPO_ID", help="A checkpoint folder, a repository, or demo.", envvar="HYBRID_K2_MODEL"
        ),
    ] = "demo",
    rules: Annotated[
        str | None, _option("--rules", "FILE|NAME", "Placement rules (left out: chosen for the machine).")
    ] = None,
    config: Annotated[
        Path | None,
        _option(
            "--config",
            "FILE",
            "Options from a YAML file; the command line and variables go before.",
            callback=use_config_file,
            is_eager=True,
        ),
    ] = None,
    host: Annotated[str, _option("--host", "ADDRESS", "Listen at this address.", _LISTEN)] = "127.0.0.1",
    port: Annotated[
        int, _option("--port", "N", "Listen at this port; 0 takes a free one.", _LISTEN, min=0, max=65535)
    ] = 8000,
    uds: Annotated[Path | None, _option("--uds", "PATH", "Listen at a UNIX socket instead.", _LISTEN)] = None,
    ssl_certfile: Annotated[Path | None, _option("--ssl-certfile", "FILE", "Certificate for TLS.", _LISTEN)] = None,
    ssl_keyfile: Annotated[Path | None, _option("--ssl-keyfile", "FILE", "Its private key.", _LISTEN)] = None,
    api_key: Annotated[
        list[str] | None, _option("--api-key", "KEY", "Take requests with this key only. Repeat for more.", _ACCESS)
    ] = None,
    api_key_file: Annotated[
        Path | None,
        _option("--api-key-file", "FILE", "Keys, one on each line; lines that begin with # are none.", _ACCESS),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        _option(
            "--allowed-host", "NAME", "Take requests that address the server by this name. Repeat for more.", _ACCESS
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, _option("--cors-origin", "ORIGIN", "Let pages from there call. Repeat for more.", _ACCESS)
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        _option("--served-model-name", "NAME", "The model's name for clients (left out: its own). Repeat for more."),
    ] = None,
    no_web: Annotated[bool, _option("--no-web", None, "Serve no web page at /.")] = False,
    strict_moonshot: Annotated[bool, _option("--strict-moonshot", None, "Refuse what Moonshot's API refuses.")] = False,
    max_running: Annotated[
        int | None, _option("--max-running", "N", "Sequences computed at once.", _LOAD, min=1)
    ] = None,
    step_tokens: Annotated[int | None, _option("--step-tokens", "N", "Tokens of one step.", _LOAD, min=1)] = None,
    max_waiting: Annotated[int | None, _option("--max-waiting", "N", "Requests in the queue.", _LOAD, min=0)] = None,
    max_running_per_key: Annotated[
        int | None, _option("--max-running-per-key", "N", "Sequences of one key computed at once.", _LOAD, min=1)
    ] = None,
    max_waiting_per_key: Annotated[
        int | None, _option("--max-waiting-per-key", "N", "Requests of one key in the queue.", _LOAD, min=0)
    ] = None,
    cache_ram: Annotated[
        str | None, _option("--cache-ram", "SIZE", "Host memory for prompts that may come again, as 16GiB.", _LOAD)
    ] = None,
    cache_file: Annotated[
        Path | None, _option("--cache-file", "FILE", "Keep them here from one run to the next.", _LOAD)
    ] = None,
    keep_alive: Annotated[float, _seconds("--keep-alive", "Comment in a silent stream; 0 for none.", _LISTEN)] = 15.0,
    drain_timeout: Annotated[
        float, _seconds("--drain-timeout", "How long requests may go on after SIGTERM.", _LISTEN)
    ] = 60.0,
    max_body: Annotated[str, _option("--max-body", "SIZE", "The largest body.", _LIMITS)] = "32MiB",
    max_bodies: Annotated[str, _option("--max-bodies", "SIZE", "All bodies together.", _LIMITS)] = "1GiB",
    max_connections: Annotated[
        int, _option("--max-connections", "N", "Connections open at once.", _LIMITS, min=1)
    ] = 512,
    max_images: Annotated[int, _option("--max-images", "N", "Images of one request.", _LIMITS, min=0)] = 32,
    video: Annotated[
        bool, _option("--video", None, "Read videos, too, with the decoders of FFmpeg (PyAV).", _LIMITS)
    ] = False,
    log_format: Annotated[str, _option("--log-format", "text|json", "How log lines look.")] = "text",
) -> None:
    """Serve a model over HTTP, with the dialects of OpenAI and Anthropic."""
    if log_format not in ("text", "json"):
        raise typer.BadParameter(f"expected text or json, got {log_format!r}", param_hint="--log-format")
    if cache_file is not None and cache_ram is None:
        raise typer.BadParameter("expected --cache-ram beside it, which takes what is read", param_hint="--cache-file")
    body_bytes, all_bodies_bytes = memory_size(max_body, "--max-body"), memory_size(max_bodies, "--max-bodies")
    cache_ram_bytes = None if cache_ram is None else memory_size(cache_ram, "--cache-ram")
    with leaving_at_once():
        try:
            from hybrid_k2.protocol.video_files import import_av
            from hybrid_k2.server.app import create_app
            from hybrid_k2.server.backend import Backend
            from hybrid_k2.server.listen import allow_connections, check_tls, listen_tcp, listen_unix
            from hybrid_k2.server.options import Limits, ServerOptions
            from hybrid_k2.server.process import Process
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"serve: expected the packages of the extra serve, got no {error.name}",
                hint="pip install 'hybrid-k2[serve]'",
            ) from None

    _show_server_log(log_format)
    if video:
        import_av("--video")
    limits = Limits(
        body_bytes=body_bytes,
        all_bodies_bytes=all_bodies_bytes,
        connections=max_connections,
        images=max_images,
        videos=MAX_VIDEOS if video else 0,
    )
    options = ServerOptions(
        model_names=tuple(served_model_name or [_own_name(model)]),
        api_keys=(*(api_key or ()), *(read_keys(api_key_file) if api_key_file else ())),
        hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        web=not no_web,
        strict_moonshot=strict_moonshot,
        keep_alive_s=keep_alive,
        limits=limits,
    )
    service_options = _service_options(
        max_running=max_running,
        step_tokens=step_tokens,
        max_waiting=max_waiting,
        max_running_per_key=max_running_per_key,
        max_waiting_per_key=max_waiting_per_key,
        cache_ram_bytes=cache_ram_bytes,
        cache_path=cache_file,
    )
    tls = check_tls(ssl_certfile, ssl_keyfile)
    allow_connections(max_connections)
    backend = Backend()
    listener = listen_tcp(host, port, tls) if uds is None else listen_unix(uds)
    if options.hosts or (listener.loopback and not options.api_keys):
        options = replace(options, hosts=("localhost", host, *options.hosts))
    notes = Output(sys.stderr)
    page = "" if no_web or uds is not None else "a page for chats at /, "
    notes.line(f"listening on {listener.address} ({page}the APIs under /v1)")
    if not options.api_keys and uds is None and not listener.loopback:
        notes.line("warning: no --api-key, so everybody who reaches this address may call", "warning")
    process = Process(
        app=create_app(backend, options),
        backend=backend,
        listener=listener,
        limits=limits,
        drain_s=drain_timeout,
        certificate=ssl_certfile,
        key=ssl_keyfile,
    )
    process.run(lambda report: _load(model, rules, service_options, notes, report))


def _load(
    model: str, rules: str | None, options: ServiceOptions, notes: Output, report: Callable[[int, int], None]
) -> Served:
    """Load the model and start its service, on the loader's thread."""
    from hybrid_k2.cli.loading import load_engine
    from hybrid_k2.engine.service import Service
    from hybrid_k2.server.backend import Served

    engine = load_engine(model, rules, notes, watch=report, check=options.check)
    if engine.images is not None and find_spec("PIL") is None:
        notes.line("warning: without Pillow, images in requests are refused: pip install pillow", "warning")
    engine.prepare_grammars()  # now: in the first request with tools it would stop all others
    return Served(engine, Service(engine, options))


def _service_options(**given: Any) -> ServiceOptions:
    """Return the service's options, with its own defaults for what was left out."""
    from hybrid_k2.engine.service_types import ServiceOptions

    return ServiceOptions(**{name: value for name, value in given.items() if value is not None})


def _show_server_log(log_format: str) -> None:
    """Send the server's log to stderr, a line for each request; other warnings of the package keep their way."""
    from hybrid_k2.server.request_log import JsonLines, TextLines

    log = logging.getLogger("hybrid_k2.server")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    log.handlers[:] = [handler]
    log.setLevel(min(logging.INFO, logging.getLogger("hybrid_k2").level or logging.INFO))
    log.propagate = False


def _own_name(model: str) -> str:
    """Return the name of a folder or a repository, without what stands before it."""
    return Path(model.rstrip("/")).name or model
