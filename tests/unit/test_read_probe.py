"""The probe of the read bandwidth: plausible figures, and never more than a quarter of the free memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hybrid_k2.errors import MemoryBudgetError
from hybrid_k2.experts import ExpertsRuntime, read_probe
from hybrid_k2.experts.read_probe import MIB, probe_bytes
from hybrid_k2.experts.reference import ReferenceRuntime
from tests.unit.experts_common import native_runtime


def give(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(read_probe, "host_memory", lambda: (1 << 50, available))


@pytest.mark.parametrize("open_runtime", [native_runtime, ReferenceRuntime])
def test_read_bandwidth_is_plausible(open_runtime: Callable[[], ExpertsRuntime]) -> None:
    runtime = open_runtime()
    assert 0.1 < runtime.measure_read_gbps(0.01) < 5000
    runtime.close()


@pytest.mark.parametrize(
    ("threads", "free_mib", "probe_mib"),
    [(1, 1 << 20, 512), (64, 1 << 20, 4096), (64, 3000, 750), (2, 1000, 250), (1, 256, 64), (16, 512, 128)],
)
def test_the_buffer_grows_with_the_threads_and_is_bounded_by_the_free_memory(
    threads: int, free_mib: int, probe_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, free_mib * MIB)
    assert probe_bytes(threads) == probe_mib * MIB


@pytest.mark.parametrize(("threads", "free_mib"), [(1, 255), (2, 0), (64, 2047)])
def test_too_little_memory_is_an_error(threads: int, free_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, free_mib * MIB)
    with pytest.raises(MemoryBudgetError, match=f"measure it with {threads} threads, got {free_mib} MiB"):
        probe_bytes(threads)


def test_the_native_probe_takes_at_least_one_unit_per_thread() -> None:
    native_runtime().close()  # skips where there is no extension
    from hybrid_k2 import _native

    runtime = _native.Runtime("portable", 3)
    assert runtime.measure_read_gbps(0.0, 6 * MIB) > 0
    with pytest.raises(ValueError, match=f"bytes: expected at least {6 * MIB}, got {6 * MIB - 1}"):
        runtime.measure_read_gbps(0.0, 6 * MIB - 1)
    runtime.close()
