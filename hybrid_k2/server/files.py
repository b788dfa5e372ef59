"""The routes `/v1/files`: texts and images that clients put here, each key its own.

They are gone when the server ends. A file is known by its id alone; its name is shown and never used.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from hybrid_k2.errors import shown
from hybrid_k2.server.context import Context
from hybrid_k2.server.errors import bad_request, json_response
from hybrid_k2.server.file_store import IMAGE_PURPOSES, TEXT_PURPOSES
from hybrid_k2.server.multipart import read_upload

MAX_NAME = 255
PURPOSES = (*TEXT_PURPOSES, *IMAGE_PURPOSES)

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


def file_routes(context: Context) -> APIRouter:
    """Return the routes of files."""
    router = APIRouter()
    store = context.files

    @router.post("/v1/files", openapi_extra=_FORM)
    async def upload_file(request: Request) -> Response:
        """Keep a text or an image."""
        upload = read_upload(request.headers.get("content-type", ""), await request.body())
        for name in upload.fields:
            if name != "purpose":
                raise bad_request(name, "expected no such field beside file and purpose")
        purpose = upload.fields.get("purpose")
        if purpose not in PURPOSES:
            raise bad_request("purpose", f"expected one of {', '.join(PURPOSES)}, got {shown(purpose)}")
        if purpose in IMAGE_PURPOSES:
            await context.images.check_upload(upload.content, context.backend.ready().model.images)
        else:
            _check_text(upload.content)
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
        """Give back a text as text and an image as bytes: a browser shall not take it for a page."""
        file = store.find(request.state.owner, file_id)
        headers = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}
        media_type = "text/plain; charset=utf-8" if file.purpose in TEXT_PURPOSES else "application/octet-stream"
        return Response(file.content, headers=headers, media_type=media_type)

    @router.delete("/v1/files/{file_id}")
    async def delete_file(request: Request, file_id: str) -> Response:
        """Forget a file."""
        store.remove(request.state.owner, file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    return router


def _check_text(content: bytes) -> None:
    try:
        content.decode()
    except UnicodeDecodeError:
        raise bad_request("file", "expected text in UTF-8, as of this purpose, got other bytes") from None
