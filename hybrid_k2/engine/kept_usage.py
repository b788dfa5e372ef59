"""Remember how often experts are used, while an engine runs and at its end: servers run for days, and are killed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from hybrid_k2.experts.usage import Counts, LayerUsage, remember_usage

log = logging.getLogger("hybrid_k2")

EVERY_S = 300.0  # what a killed process loses at most


class KeptUsage:
    """Write the counts of a model's experts for the next start: now and then, and at the end.

    Not for two threads at once.
    Effects: starts a thread for each writing in between.
    """

    def __init__(self, checkpoint: Path, layers: Mapping[int, LayerUsage]) -> None:
        """`layers`: those that count; there may be none, and then nothing is written."""
        self._checkpoint = checkpoint
        self._layers = dict(layers)
        self._due = time.monotonic() + EVERY_S
        self._writer: threading.Thread | None = None

    def after_step(self) -> None:
        """Begin to write the counts if that is due; to be called while no step runs. Waits for no disk."""
        if not self._layers or time.monotonic() < self._due or (self._writer is not None and self._writer.is_alive()):
            return
        self._due = time.monotonic() + EVERY_S
        if (counts := self._counts()) is not None:
            arguments = self._checkpoint, counts
            self._writer = threading.Thread(target=remember_usage, args=arguments, name="k2-usage", daemon=True)
            self._writer.start()

    def close(self) -> None:
        """Write the counts as they are now, or warn where the accelerator has lost them."""
        if not self._layers:
            return
        if self._writer is not None:
            self._writer.join()
        if (counts := self._counts()) is not None:
            remember_usage(self._checkpoint, counts)

    def _counts(self) -> Counts | None:
        try:
            return {layer: usage.counts() for layer, usage in self._layers.items()}
        except RuntimeError as error:  # torch's, of a card that failed
            log.warning("how often experts were used is not remembered: %s", error)
            return None
