"""API keys from files, options and the environment; none of them is ever printed."""

from __future__ import annotations

import os
from pathlib import Path

from hybrid_k2.errors import ConfigError

VARIABLE = "HYBRID_K2_API_KEY"
_MAX_FILE_BYTES = 1 << 20


def read_keys(file: Path) -> list[str]:
    """Read keys, one on each line; lines that begin with # are none. Raises: ConfigError: no file, or no key in it."""
    from hybrid_k2.files import read_file

    text = read_file(file, ConfigError, _MAX_FILE_BYTES)
    try:
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: expected UTF-8 text, one API key on each line") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{file}: expected at least one API key, got none")
    return keys


def own_key(option: str | None, file: Path | None) -> str | None:
    """Return the key to call a server with: the option's, the first of the file, or the environment's.

    Raises: ConfigError: no header can hold it.
    """
    if option is not None:
        key, source = option, "--api-key"
    elif file is not None:
        key, source = read_keys(file)[0], str(file)
    else:
        key, source = os.environ.get(VARIABLE, "").strip(), VARIABLE
        if not key:
            return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{source}: expected one API key of printable ASCII without spaces, got something else")
    return key
