"""An engine for a module of tests of the service; each test gives all pages back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_k2.engine import Engine
from tests.engines import free_pages, native_engine
from tests.services import CHUNK, PAGES


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with native_engine(Path(tmp_path_factory.mktemp("model")), chunk_tokens=CHUNK, tokens=PAGES * 64) as one:
        assert one.loaded.block_tokens == 1
        yield one


@pytest.fixture(autouse=True)
def all_pages_come_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        assert free_pages(request.getfixturevalue("engine")) == PAGES
