"""The files that clients put here: in memory, within bounds, each with its owner."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from hybrid_k2.errors import shown
from hybrid_k2.server.errors import ApiError, bad_request
from hybrid_k2.server.openai_usage import new_id

MAX_FILES = 1000  # of one key, as the official API
MAX_BYTES = 256 * 2**20  # of all keys
TEXT_PURPOSES = ("file-extract", "user_data")
IMAGE_PURPOSES = ("image", "vision")  # what Moonshot and OpenAI call it


@dataclass(frozen=True)
class StoredFile:
    """One file and what its owner knows about it."""

    id: str
    owner: str
    name: str
    purpose: str
    content: bytes
    created_at: int

    def described(self) -> dict[str, Any]:
        """Return the file as the API shows it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.content),
            "created_at": self.created_at,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "ok",
            "status_details": None,
        }


class FileStore:
    """Hold the files of all keys. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, StoredFile] = {}

    def add(self, owner: str, name: str, purpose: str, content: bytes) -> StoredFile:
        """Keep a file. Raises: ApiError 400 when there is no room."""
        file = StoredFile(new_id("file-"), owner, name, purpose, content, int(time.time()))
        with self._lock:
            if sum(other.owner == owner for other in self._files.values()) >= MAX_FILES:
                raise bad_request("file", f"expected at most {MAX_FILES} files, got one more")
            if sum(len(other.content) for other in self._files.values()) + len(content) > MAX_BYTES:
                raise bad_request("file", f"expected at most {MAX_BYTES} bytes in all files, got more")
            self._files[file.id] = file
        return file

    def find(self, owner: str, file_id: str) -> StoredFile:
        """Return a file of this owner. Raises: ApiError 404, also for one of somebody else."""
        with self._lock:
            file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise ApiError(404, f"file: expected the id of one, got {shown(file_id)}", param="file_id")
        return file

    def all_of(self, owner: str) -> list[StoredFile]:
        """Return the files of an owner, the newest first."""
        with self._lock:
            return [file for file in reversed(self._files.values()) if file.owner == owner]

    def remove(self, owner: str, file_id: str) -> None:
        """Forget a file. Raises: ApiError 404."""
        self.find(owner, file_id)
        with self._lock:
            self._files.pop(file_id, None)
