"""From what the user names, a folder or a repository of the Hugging Face hub, to a checkpoint folder."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from hybrid_k2.config import CONFIG_NAME, ModelConfig
from hybrid_k2.errors import CheckpointError

# What the engine reads of a repository; no code of it is fetched or run.
CONFIG_FILES = ("*.json",)
WEIGHT_FILES = ("tiktoken.model", "*.safetensors")
_UNKNOWABLE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_checkpoint(path_or_repo_id: str, check: Callable[[Path], object] = ModelConfig.load) -> Path:
    """Return the checkpoint's folder; download a repository "owner/name" unless it is in the local cache already.

    An existing path always wins over a repository of the same name. Of a repository the configuration is fetched first
    and its folder given to `check`, so that what does not suit is refused before its weights are downloaded.
    Effects: may download the whole checkpoint into the hub's cache folder.
    Raises: CheckpointError, ConfigError, UnsupportedModelError; what `check` raises.
    """
    path = Path(os.path.expanduser(path_or_repo_id))
    if path_or_repo_id and _exists(path):
        return _folder(path)
    if not _REPO_ID.fullmatch(path_or_repo_id):
        raise CheckpointError(
            f"{path_or_repo_id!r}: expected a checkpoint folder or a repository like moonshotai/Kimi-K2.6, got neither",
            hint="check the path: there is no such folder",
        )
    check(_fetch(path_or_repo_id, CONFIG_FILES))
    return _fetch(path_or_repo_id, CONFIG_FILES + WEIGHT_FILES)


def resolve_configuration(path_or_repo_id: str) -> Path:
    """Return a folder with the checkpoint's configuration; of a repository only its JSON files are fetched.

    Raises: CheckpointError.
    """
    path = Path(os.path.expanduser(path_or_repo_id))
    if path_or_repo_id and not _exists(path) and _REPO_ID.fullmatch(path_or_repo_id):
        return _fetch(path_or_repo_id, CONFIG_FILES)
    return resolve_checkpoint(path_or_repo_id)


def _exists(path: Path) -> bool:
    """Say whether there is such a path. Raises: CheckpointError where the system does not let us know."""
    try:
        path.stat()
    except OSError as error:
        if error.errno in _UNKNOWABLE:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        return False
    except ValueError:  # a null character
        return False
    return True


def _folder(path: Path) -> Path:
    hint = "give the folder that holds config.json and the model's .safetensors files"
    gguf_hint = f"GGUF is not read: {hint}, as moonshotai/Kimi-K2.6 has them"
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: expected a checkpoint folder, got a file", hint=gguf_hint if path.suffix == ".gguf" else hint
        )
    try:
        names = [entry.name for entry in path.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not names:
        raise CheckpointError(f"{path}: expected a checkpoint folder, got an empty one", hint=hint)
    if CONFIG_NAME not in names and any(name.endswith(".gguf") for name in names):
        raise CheckpointError(f"{path}: expected a checkpoint with {CONFIG_NAME}, got GGUF files", hint=gguf_hint)
    return path


def _fetch(repo_id: str, patterns: tuple[str, ...]) -> Path:
    """Download the files that match into the hub's cache, or find them there."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises its HTTP library's own classes too, and that library changes
        raise _hub_error(repo_id, error) from error


def _hub_error(repo_id: str, error: Exception) -> CheckpointError:
    from huggingface_hub import errors as hub

    subject = f"{repo_id}: expected a folder or a repository of the Hugging Face hub"
    if isinstance(error, hub.GatedRepoError):
        return CheckpointError(
            f"{subject}, got a repository that asks for consent",
            hint=f"accept its terms at https://huggingface.co/{repo_id}, then run `hf auth login`",
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return CheckpointError(
            f"{subject}, got neither: no such folder, and no such repository that you may read",
            hint="check the spelling; for a private repository run `hf auth login` first",
        )
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
        return CheckpointError(
            f"{subject}, got neither: no such folder, and the hub cannot be reached",
            hint="check the path or the network; a checkpoint that was downloaded before is found without one",
        )
    reason = next(iter(str(error).splitlines()), "no reason given")
    return CheckpointError(f"{repo_id}: the download failed: {type(error).__name__}: {reason}")
