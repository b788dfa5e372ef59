"""How a command ends: exit codes, and what is said on stderr.

0    done                                     70   a bug: traceback, and a request to report it
1    one `error: ...`                         130  Ctrl-C
2    wrong usage (said by typer)              141  the reader of stdout has gone (`| head`)
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from hybrid_k2.cli.interrupts import INTERRUPTED
from hybrid_k2.cli.streams import OutputError
from hybrid_k2.cli.terminal import Output
from hybrid_k2.errors import HybridK2Error

FAILED, BUG, PIPE_CLOSED = 1, 70, 141


def say_error(output: Output, error: HybridK2Error) -> None:
    """Print one error, and its hint if it has one."""
    output.write("error: ", "error")
    output.line(error.message)
    if error.hint:
        output.line(f"hint: {error.hint}", "dim")


def ends_cleanly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a command may expect to meet into a message and an exit code; a bug passes through."""

    @functools.wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HybridK2Error as error:
            say_error(Output(sys.stderr), error)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(INTERRUPTED) from interrupt

    return run_command


def say_output_error(error: OutputError) -> int:
    """Print why the output ended, unless its reader wanted no more; return the exit code."""
    if error.reader_left:
        return PIPE_CLOSED
    say_error(Output(sys.stderr), HybridK2Error(str(error)))
    return FAILED


def say_bug(error: Exception, version: str) -> None:
    """Print the traceback of an error that hybrid-k2 did not foresee."""
    traceback.print_exception(error, file=sys.stderr)
    Output(sys.stderr).line(
        f"error: this is a bug of hybrid-k2 {version}: please report it with the lines above and the command", "error"
    )
