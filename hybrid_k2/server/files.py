"""The routes `/v1/files`: texts that clients put here to read them again, each key its own.

They are kept in memory, within bounds, and are gone when the server ends. A file is known by its id alone; its name is
shown and never used.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.errors import shown
from hybrid_k2.server.context import Context
from hybrid_k2.server.errors import ApiError, bad_request, json_response
from hybrid_k2.server.multipart import read_upload
from hybrid_k2.server.openai_usage import new_id

MAX_FILES = 1000  # of one key, as the official API
MAX_BYTES = 256 * 2**20  # of all keys
MAX_NAME = 255
PURPOSES = ("file-extract", "user_data")

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                    "required": ["file", "purpose"],
                }
            }
        },
    }
}


@dataclass(frozen=True)
class StoredFile:
    """One text and what its owner knows about it."""

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


def file_routes(context: Context) -> APIRouter:
    """Return the routes of files."""
    router = APIRouter()
    store = FileStore()

    @router.post("/v1/files", openapi_extra=_FORM)
    async def upload_file(request: Request) -> Response:
        """Keep a text."""
        upload = read_upload(request.headers.get("content-type", ""), await request.body())
        for name in upload.fields:
            if name != "purpose":
                raise bad_request(name, "expected no such field beside file and purpose")
        purpose = upload.fields.get("purpose")
        if purpose not in PURPOSES:
            raise bad_request("purpose", f"expected one of {', '.join(PURPOSES)}, got {shown(purpose)}")
        try:
            upload.content.decode()
        except UnicodeDecodeError:
            raise bad_request("file", "expected text in UTF-8: this version reads nothing else") from None
        owner, filename = request.state.owner, upload.filename[:MAX_NAME]
        return json_response(store.add(owner, filename, purpose, upload.content).described())

    @router.get("/v1/files")
    async def list_files(request: Request) -> Response:
        """List one's own files."""
        files = [file.described() for file in store.all_of(request.state.owner)]
        return json_response({"object": "list", "data": files, "has_more": False})

    @router.get("/v1/files/{file_id}")
    async def get_file(request: Request, file_id: str) -> Response:
        """Describe a file."""
        return json_response(store.find(request.state.owner, file_id).described())

    @router.get("/v1/files/{file_id}/content")
    async def get_content(request: Request, file_id: str) -> Response:
        """Give back the text, as text: a browser shall not take it for a page."""
        content = store.find(request.state.owner, file_id).content
        headers = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}
        return Response(content, headers=headers, media_type="text/plain; charset=utf-8")

    @router.delete("/v1/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> Response:
        """Forget a file."""
        store.remove(request.state.owner, file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    return router
