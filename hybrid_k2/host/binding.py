"""Say once where the system refuses to bind memory to NUMA nodes."""

from __future__ import annotations

import logging
from functools import cache

log = logging.getLogger("hybrid_k2")


@cache
def warn_unbound() -> None:
    """Warn that weights lie where the threads of their node touched them first.

    Effects: logs on the first call of the process alone.
    """
    log.warning(
        "the system refuses to bind memory to NUMA nodes (in a container: give it the right to call mbind); the threads"
        " of each node touch its weights first instead, which leaves them elsewhere where the node's memory is short"
    )
