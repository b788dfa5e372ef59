"""The bookkeeping of a hand-off's two slots: what each holds, and how long that may take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hybrid_k2.errors import EngineError
from hybrid_k2.experts.base import check_slot


@dataclass(frozen=True)
class TimeLimit:
    """Bound how long a computation may take: so many seconds, and so many more for each token of its batch."""

    start_s: float
    token_s: float = 0.0

    def of(self, tokens: int) -> float:
        """Return the limit for a batch of so many tokens. Units: s."""
        return self.start_s + tokens * self.token_s


MINUTE = TimeLimit(60.0)


@dataclass(frozen=True)
class Posted:
    """What a slot holds: a layer's computation for so many tokens, which may take so long."""

    layer: int
    tokens: int
    limit_s: float


class Slots:
    """Keep what was posted in each slot until it is taken; `layers` are those with experts."""

    def __init__(self, layers: Iterable[int], limit: TimeLimit) -> None:
        self.limit = limit
        self._layers = frozenset(layers)
        self._posted: dict[int, Posted] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Say whether `close` was called."""
        return self._closed

    @contextmanager
    def posting(self, slot: int, layer: int, tokens: int) -> Iterator[None]:
        """Fill a slot while its computation is started; it is free again if that raises an error.

        The slot is filled first: an interrupt may come in between, and leaves it filled.
        Raises: ValueError: a slot that does not exist or is in flight; EngineError, that names the layer: the hand-off
        is closed, a layer without experts, or one whose computation could not be started.
        """
        self._check(slot)
        if layer not in self._layers:
            raise EngineError(f"layer {layer}: expected a layer with experts, got one without")
        if slot in self._posted:
            raise ValueError(f"slot {slot}: expected a free one, got one that holds layer {self._posted[slot].layer}")
        self._posted[slot] = Posted(layer, tokens, self.limit.of(tokens))
        try:
            with named(layer):
                yield
        except Exception:
            del self._posted[slot]
            raise

    @contextmanager
    def taking(self, slot: int, layer: int) -> Iterator[Posted]:
        """Free a slot when its result has been taken; it stays filled if that fails.

        Raises: ValueError: a slot that does not hold this layer; EngineError, that names the layer.
        """
        self._check(slot)
        posted = self._posted.get(slot)
        if posted is None or posted.layer != layer:
            held = "nothing" if posted is None else f"layer {posted.layer}"
            raise ValueError(f"slot {slot}: expected it to hold layer {layer}, got {held}")
        with named(layer):
            yield posted
        del self._posted[slot]

    def filled(self) -> list[tuple[int, Posted]]:
        """List the slots that hold something."""
        return list(self._posted.items())

    def free(self, slot: int) -> None:
        """Forget what a slot holds."""
        self._posted.pop(slot, None)

    def close(self) -> None:
        """Refuse what comes from now on."""
        self._closed = True

    def _check(self, slot: int) -> None:
        check_slot(slot)
        if self._closed:
            raise EngineError("hand-off: expected an open one, got a closed one")


@contextmanager
def named(layer: int) -> Iterator[None]:
    """Name the layer in an error of its experts."""
    try:
        yield
    except EngineError as error:
        raise EngineError(f"layer {layer}: {error.message}", hint=error.hint) from error
