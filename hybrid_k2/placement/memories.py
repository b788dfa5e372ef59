"""Devices compute, memories hold: the host twin is a device of its own whose memory is the host's."""

from __future__ import annotations

HOST = "host"
TWIN = "twin"  # a thread of the host in a GPU's place


def memory_of(device: str) -> str:
    """Return the device whose memory holds what stands on this one."""
    return HOST if device == TWIN else device
