"""The entry point of `hybrid-k2`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hybrid_k2 import __version__
from hybrid_k2.cli.bench import app as bench
from hybrid_k2.cli.chat.command import chat
from hybrid_k2.cli.doctor.command import doctor
from hybrid_k2.cli.exits import BUG, FAILED, say_bug, say_error, say_output_error
from hybrid_k2.cli.interrupts import INTERRUPTED
from hybrid_k2.cli.log import show_log
from hybrid_k2.cli.serve import serve
from hybrid_k2.cli.streams import OutputError, own_streams
from hybrid_k2.cli.terminal import Output
from hybrid_k2.errors import HybridK2Error

app = typer.Typer(
    name="hybrid-k2",
    help="Run Kimi K2.6 on one GPU and host memory, or on the host alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(chat)
app.command()(serve)
app.command()(doctor)
app.add_typer(bench, name="bench")


def _say_version(wanted: bool) -> None:
    if wanted:
        Output(sys.stdout).line(f"hybrid-k2 {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run Kimi K2.6 on one GPU and host memory, or on the host alone."""


def run(arguments: list[str] | None = None) -> None:
    """Run the command line, and leave Python with its exit code.

    Raises: SystemExit, always.
    """
    try:
        with own_streams():
            _run(arguments)
    except OutputError as error:
        sys.exit(say_output_error(error))


def _run(arguments: list[str] | None) -> None:
    try:
        show_log()
        app(arguments, prog_name="hybrid-k2")
    except HybridK2Error as error:
        say_error(Output(sys.stderr), error)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OutputError:
        raise
    except Exception as error:
        say_bug(error, __version__)
        sys.exit(BUG)
