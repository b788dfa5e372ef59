"""Warnings of the package on stderr, once each; `HYBRID_K2_LOG` sets what is shown."""

from __future__ import annotations

import logging
import os
import sys

from hybrid_k2.cli.terminal import Output
from hybrid_k2.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
VARIABLE = "HYBRID_K2_LOG"


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        style = "warning" if record.levelno >= logging.WARNING else "dim"
        Output(sys.stderr).line(f"{record.levelname.lower()}: {record.getMessage()}", style)


def show_log() -> None:
    """Send the log of `hybrid_k2` to stderr.

    Raises: ConfigError: HYBRID_K2_LOG is not a level.
    """
    level = os.environ.get(VARIABLE) or "warning"
    if level not in LEVELS:
        raise ConfigError(f"{VARIABLE}: expected one of {', '.join(LEVELS)}, got {level!r}")
    log = logging.getLogger("hybrid_k2")
    log.setLevel(level.upper())
    if not any(isinstance(handler, _Lines) for handler in log.handlers):
        log.addHandler(_Lines())
