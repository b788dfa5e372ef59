"""What every route works with."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from hybrid_k2.errors import shown
from hybrid_k2.server.backend import Backend
from hybrid_k2.server.errors import ApiError
from hybrid_k2.server.file_store import FileStore
from hybrid_k2.server.images import ImageReader
from hybrid_k2.server.metrics import Metrics
from hybrid_k2.server.options import ServerOptions
from hybrid_k2.server.run import Run


@dataclass(frozen=True)
class Context:
    """The server's backend, options and metrics, the clients' files, and what decodes images."""

    backend: Backend
    options: ServerOptions
    metrics: Metrics
    files: FileStore
    images: ImageReader
    created: int  # when the server started, in seconds since 1970

    def check_model(self, name: str | None) -> str:
        """Return the name of the model in replies. Raises: ApiError 404 for a model that is not served."""
        names = self.options.model_names
        if name is None or name in names:
            return name or names[0]
        raise ApiError(
            404, f"model: expected {' or '.join(names)}, got {shown(name)}", param="model", code="model_not_found"
        )

    def run(self, request: Request) -> Run:
        """Begin a request of the service. Raises: ApiError 503 while there is none."""
        return Run(self.backend.ready().service, self.metrics, request.state.log)
