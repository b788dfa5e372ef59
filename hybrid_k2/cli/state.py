"""Where the command keeps what outlives it."""

from __future__ import annotations

import os
from pathlib import Path

from hybrid_k2.errors import ConfigError


def state_folder() -> Path:
    """Return the folder of the history and of rescued conversations, by the XDG rules; it need not exist.

    Raises: ConfigError: the user has no home folder.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(state):
        return Path(state) / "hybrid-k2"
    try:
        return Path.home() / ".local" / "state" / "hybrid-k2"
    except RuntimeError as error:  # HOME is not set, and the system does not know the user either
        raise ConfigError(
            "home folder: expected HOME or an entry of the user in the system's list, got none"
        ) from error
