"""Engines whose latents differ are told apart, so that neither reads what the other one saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.engine.fingerprint import fingerprint
from tests.engines import random_engine


@pytest.mark.parametrize(
    "change",
    [{"numerics": "fast"}, {"activation_dtype": "bf16"}, {"accelerator": "twin"}, {"overlap": "ping_pong"},
     {"stream": "auto"}, {"nodes": ()}, {"rows": ()}],
)  # fmt: skip
def test_another_plan_has_another_fingerprint(tmp_path: Path, change: dict[str, Any]) -> None:
    with random_engine(tmp_path) as engine:
        loaded = engine.loaded
        assert fingerprint(replace(loaded, plan=replace(loaded.plan))) == fingerprint(loaded)
        assert fingerprint(replace(loaded, plan=replace(loaded.plan, **change))) != fingerprint(loaded)
