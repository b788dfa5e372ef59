"""From a path or a repository name to a folder, against a hub that runs on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hybrid_k2.checkpoint import Checkpoint, check_checkpoint, planned_packed, resolve_checkpoint, resolve_configuration
from hybrid_k2.config import ModelConfig
from hybrid_k2.errors import CheckpointError
from tests.conftest import REPO
from tests.generators import write_checkpoint

COMMIT = "c0ffee" + 34 * "0"
# Resolves every argument ("config:NAME": its configuration alone; "tight:NAME": loads it into 1 KiB) and prints one
# JSON line for each: the folder, or the error's class and text.
PROGRAM = """
import json, sys
from hybrid_k2.checkpoint import resolve_checkpoint, resolve_configuration
from hybrid_k2.errors import HybridK2Error

def load_into_1_kib(name):
    from dataclasses import replace
    from hybrid_k2.engine.loading import load_model
    from hybrid_k2.placement import shipped_rules
    rules = shipped_rules("host")
    return load_model(name, replace(rules, devices=replace(rules.devices, host_memory_bytes=1024)), None, None).folder

KINDS = {"config": resolve_configuration, "tight": load_into_1_kib}
for name in sys.argv[1:]:
    try:
        kind, _, rest = name.partition(":")
        print(json.dumps(["folder", str(KINDS[kind](rest) if rest else resolve_checkpoint(name))]))
    except HybridK2Error as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


class Hub(BaseHTTPRequestHandler):
    """Answer as much of the hub's protocol as a download needs; folders of `root` are the repositories."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        repo = self.root / owner / name
        if name == "gated":
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif name == "broken":
            self.send(400, b"{}", {}, body)
        elif not repo.is_dir():
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif api:
            self.send(200, json.dumps(self.listing(repo, rest)).encode(), {"Content-Type": "application/json"}, body)
        else:
            data = (repo / "/".join(rest[2:])).read_bytes()  # rest: resolve, commit, path
            self.send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)

    def listing(self, repo: Path, rest: list[str]) -> Any:
        names = sorted(path.name for path in repo.iterdir())
        if rest[:1] == ["tree"]:
            return [
                {
                    "type": "file",
                    "path": name,
                    "size": (repo / name).stat().st_size,
                    "oid": hashlib.sha1((repo / name).read_bytes()).hexdigest(),
                }
                for name in names
            ]
        repo_id = f"{repo.parent.name}/{repo.name}"
        return {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


class Downloads:
    """Run the resolver in a process of its own, since the hub's client reads its settings when it is imported."""

    def __init__(self, endpoint: str, cache: Path, asked: list[str]) -> None:
        self.endpoint, self.cache, self.asked = endpoint, cache, asked

    def resolve(self, *names: str, **settings: str) -> list[tuple[str, str]]:
        private = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
        environment = (
            os.environ
            | private
            | {
                "HF_ENDPOINT": self.endpoint,
                "HF_HOME": str(self.cache),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "OMP_NUM_THREADS": "1",
                **settings,
            }
        )
        command = [sys.executable, "-c", PROGRAM, *names]
        done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloads]:
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    write_checkpoint(root / "lab" / "tiny", seed=4, shards=2)
    (root / "lab" / "tiny" / "modeling.py").write_text("raise SystemExit('code of a checkpoint was run')")
    write_checkpoint(root / "lab" / "large", seed=5, shards=2)
    (root / "lab" / "llama").mkdir()
    (root / "lab" / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (root / "lab" / "llama" / "model.safetensors").write_bytes(bytes(64))
    Hub.root, Hub.asked = root, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Downloads(f"http://127.0.0.1:{server.server_port}", cache, Hub.asked)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def resolved(hub: Downloads) -> list[tuple[str, str]]:
    return hub.resolve("lab/tiny", "lab/gated", "lab/none", "lab/broken", "lab/llama")


def test_repositories(hub: Downloads, resolved: list[tuple[str, str]]) -> None:
    tiny, gated, missing, broken, llama = resolved

    assert tiny[0] == "folder", tiny
    folder = Path(tiny[1])
    assert not (folder / "modeling.py").exists()
    config = ModelConfig.load(folder)
    with Checkpoint.open(folder) as checkpoint:
        check_checkpoint(checkpoint, config)
    assert {"tiktoken.model", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in folder.iterdir()}

    assert gated[0] == "CheckpointError"
    assert "lab/gated: expected a folder or a repository" in gated[1]
    assert "asks for consent\nhint: accept its terms at https://huggingface.co/lab/gated" in gated[1]
    assert missing[0] == "CheckpointError"
    assert "lab/none: expected a folder" in missing[1]
    assert "no such repository that you may read\nhint: " in missing[1]
    assert broken[0] == "CheckpointError"
    assert "lab/broken" in broken[1]

    assert llama[0] == "UnsupportedModelError"
    assert "got 'llama'" in llama[1]
    assert not any("lab/llama" in path and "safetensors" in path for path in hub.asked)  # refused before the weights


def test_of_a_repository_that_is_planned_no_weights_are_fetched(hub: Downloads) -> None:
    (large,) = hub.resolve("config:lab/large")
    assert large[0] == "folder", large
    folder = Path(large[1])
    assert planned_packed(folder, ModelConfig.load(folder))
    assert {"config.json", "model.safetensors.index.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.safetensors"))
    assert not any("lab/large" in path and path.endswith((".safetensors", ".model")) for path in hub.asked)


def test_a_repository_that_does_not_fit_the_machine_is_refused_before_its_weights(hub: Downloads) -> None:
    (large,) = hub.resolve("tight:lab/large")
    assert large[0] == "MemoryBudgetError", large
    assert "host: expected a plan of at most 1.00 KiB" in large[1]
    assert not any("lab/large" in path and path.endswith((".safetensors", ".model")) for path in hub.asked)


def test_an_unreachable_hub(hub: Downloads, resolved: list[tuple[str, str]]) -> None:
    again, unknown = hub.resolve("lab/tiny", "lab/other", HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    assert again == resolved[0]
    assert unknown[0] == "CheckpointError"
    assert "no such folder, and the hub cannot be reached\nhint: check the path or the network" in unknown[1]


def test_a_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "lab" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_checkpoint("lab/tiny") == Path("lab/tiny")
    assert resolve_checkpoint(str(folder)) == folder
    assert resolve_checkpoint("~/lab/tiny") == folder
    assert resolve_configuration("lab/tiny") == Path("lab/tiny")
    assert resolve_configuration("~/lab/tiny") == folder


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty: expected a checkpoint folder, got an empty one") as error:
        resolve_checkpoint(str(tmp_path / "empty"))
    assert error.value.hint
    with pytest.raises(CheckpointError, match=r"file\.safetensors: expected a checkpoint folder, got a file") as error:
        resolve_checkpoint(str(tmp_path / "file.safetensors"))
    assert error.value.hint
    assert "GGUF" not in error.value.hint


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "Kimi-K2.6-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"expected a checkpoint (folder, got a file|with .*, got GGUF)"
        ) as error:
            resolve_checkpoint(str(path))
        assert "GGUF is not read" in str(error.value.hint)
    (tmp_path / "config.json").touch()  # both kinds in one folder
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_a_folder_that_nobody_may_look_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(str(loop / "model"))
    assert caught.value.message == f"{loop / 'model'}: cannot be read: Too many levels of symbolic links"
    # The administrator may look into every folder, so the answer of the system is played where the tests run as one.
    closed = tmp_path / "closed"
    write_checkpoint(closed / "model", num_hidden_layers=1)
    closed.chmod(0)
    try:
        if os.geteuid() == 0:
            monkeypatch.setattr(Path, "stat", refuse_stat)
        with pytest.raises(CheckpointError) as caught:
            resolve_checkpoint(str(closed / "model"))
    finally:
        monkeypatch.undo()
        closed.chmod(0o700)
    assert caught.value.message == f"{closed / 'model'}: cannot be read: Permission denied"
    assert resolve_checkpoint(str(closed / "model")) == closed / "model"


def refuse_stat(path: Path, **_: Any) -> os.stat_result:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize(
    "name", ["", "nothing", "/no/such/folder", "a/b/c", "../x/y", "a b/c", "~no-such-user", "x\0/y", 300 * "x"]
)
def test_neither_a_folder_nor_a_repository(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="expected a checkpoint folder or a repository") as error:
        resolve_checkpoint(name)
    assert error.value.message.startswith(repr(name))
    assert error.value.hint
