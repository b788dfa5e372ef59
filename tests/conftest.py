"""Places and fixtures that several tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from hybrid_k2.experts import read_probe

# A busy machine makes an example slow, not wrong.
settings.register_profile("hybrid-k2", deadline=None)
settings.load_profile("hybrid-k2")

# A shell lets what it starts in the background ignore Ctrl-C, and so would every command that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("HYBRID_K2_SHARED", REPO.parent / "shared"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the tests, and what they start, remember nothing in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Let oracles multiply on one thread: on small tensors two wait for each other longer than they compute."""
    torch.set_num_threads(1)


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure memory on as little of it as is allowed, where no figure is judged: more takes a while to get."""
    for name in ("BYTES", "BYTES_PER_THREAD"):
        monkeypatch.setattr(read_probe, f"WANTED_{name}", getattr(read_probe, f"LEAST_{name}"))


@pytest.fixture(scope="session")
def kimi_data() -> Path:
    """The folder with the real K2.6 tokenizer, chat template and configs."""
    folder = SHARED / "data" / "kimi-k2.6"
    if not folder.is_dir():
        pytest.skip(f"the K2.6 data files are not at {folder}")
    return folder
