"""What an engine holds is given back when it is closed, also while somebody still holds the engine itself."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest

from hybrid_k2.engine import Engine
from tests.engines import generated, random_engine


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return random_engine(tmp_path)


def test_the_memory_of_the_cache_is_given_back(engine: Engine) -> None:
    generated(engine, [3, 4, 5], max_tokens=2)
    layers = [weakref.ref(layer) for layer in engine._cache.layers]
    engine.close()
    assert all(layer() is None for layer in layers)
    assert engine._cache.pool.available == engine._cache.pool.pages
