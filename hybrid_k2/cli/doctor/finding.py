"""What a check found: one line each, good or bad, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from hybrid_k2.errors import HybridK2Error

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"  # it works, but not as it could, or not all of it
FAILED: Literal["failed"] = "failed"  # what the product needs does not work
REPORT = "this is a bug of hybrid-k2, or of what it stands on: please report it"


@dataclass(frozen=True)
class Finding:
    """Say how something is; `hint`: what to do where it is not ok."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str
    hint: str | None = None


Check = Callable[[], Iterable[Finding]]


def look(name: str, check: Check) -> Iterator[Finding]:
    """Yield what a check finds; whatever ends it is a finding, too: the others are wanted all the same."""
    try:
        yield from check()
    except HybridK2Error as error:
        yield failed(name, error)
    except Exception as error:  # a library that is broken raises what it likes
        yield Finding(name, FAILED, f"{type(error).__name__}: {error}", REPORT)


def failed(name: str, error: HybridK2Error) -> Finding:
    """Turn an error into a finding."""
    return Finding(name, FAILED, error.message, error.hint)
