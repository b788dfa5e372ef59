"""The errors that a user of hybrid-k2 can meet.

    HybridK2Error
    ├── ConfigError              config.json or a setting is missing, ill-typed or contradictory
    ├── UnsupportedModelError    a valid checkpoint of a kind that is not implemented
    ├── CheckpointError          a tensor, shard, index or tokenizer file is missing or damaged
    ├── RulesError               a placement rule file is wrong (message carries file and line)
    ├── HardwareError            the machine lacks something that was asked for
    │   ├── IsaError             a forced instruction set is unknown, not built or not supported
    │   └── MemoryBudgetError    a plan needs more memory than a device has
    ├── ServerError              a server that is asked cannot be reached, refuses, or breaks off
    └── EngineError              the running engine cannot go on
        └── RequestError         one request is wrong; the engine serves the next one
            └── ContextLengthError   its prompt and reply do not fit into the context

Each message says what was checked, what was expected, what was found and where. Anything else that
escapes (a plain Python exception) is a bug of hybrid-k2.
"""

from __future__ import annotations

_SHOWN_CHARACTERS = 100  # a message stays readable, whatever was given


def shown(value: object) -> str:
    """Show a value in an error message, in one short piece; works for any size and depth."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, or thousands of levels
        return f"a value too large to show ({type(value).__name__})"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


class HybridK2Error(Exception):
    """Base of every error that is not a bug; `hint` says what the user can do about it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(HybridK2Error):
    """A configuration file or value is missing, ill-typed or contradictory."""


class UnsupportedModelError(HybridK2Error):
    """The checkpoint is valid but of a kind that hybrid-k2 does not implement."""


class CheckpointError(HybridK2Error):
    """A file or tensor of the checkpoint is missing, damaged or of the wrong shape."""


class RulesError(HybridK2Error):
    """A placement rule file cannot be read or contradicts itself or the model."""


class HardwareError(HybridK2Error):
    """The machine lacks something that was asked for."""


class IsaError(HardwareError):
    """A forced instruction set is unknown, not built or not supported by this CPU."""


class MemoryBudgetError(HardwareError):
    """A plan needs more memory than a device has."""


class ServerError(HybridK2Error):
    """A server that is asked for something cannot be reached, refuses, or breaks off."""


class EngineError(HybridK2Error):
    """The running engine cannot go on."""


class RequestError(EngineError):
    """One request is wrong; the engine can serve the next one."""


class ContextLengthError(RequestError):
    """The prompt, or prompt and reply together, are longer than the context."""
