"""Requests to a server, and every way in which they can fail as one clear error."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any

from hybrid_k2.cli.remote.address import CONNECT_S, Address
from hybrid_k2.errors import ServerError, shown

GET_TIMEOUT_S = 3 * CONNECT_S
_MAX_BODY_BYTES = 1 << 20  # of a response that is not a stream
_MAX_LINE_BYTES = 16 << 20  # of a stream
_Failure = (OSError, http.client.HTTPException, UnicodeError)  # the last: a host's name that is none


class Server:
    """Send requests to one server, each on a connection of its own."""

    def __init__(self, address: Address, api_key: str | None) -> None:
        self.name = address.text
        self._address = address
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> tuple[int, Any]:
        """Return the status and the JSON of a resource (None: it was none).

        Raises: ServerError: the server cannot be reached, or speaks no HTTP.
        """
        try:
            with closing(self._address.connect()) as connection:
                connection.sock.settimeout(GET_TIMEOUT_S)
                response = self._request(connection, "GET", path)
                return response.status, read_json(response)
        except _Failure as error:
            raise self.failure(error) from error

    def stream(self, path: str, body: Mapping[str, Any]) -> EventStream:
        """Post JSON and return the stream that answers it. Raises: ServerError: also if the request is refused."""
        try:
            with ExitStack() as until_it_streams:
                connection = until_it_streams.enter_context(closing(self._address.connect()))
                sock = connection.sock  # http.client forgets it if the server will close it
                response = until_it_streams.enter_context(
                    closing(self._request(connection, "POST", path, json.dumps(body).encode()))
                )
                if response.status != 200:
                    raise self.refusal(response.status, read_json(response), response.headers.get("retry-after"))
                if response.headers.get_content_type() != "text/event-stream":
                    raise self.stranger(f"{response.headers.get_content_type()} as the answer to {path}")
                until_it_streams.pop_all()
                return EventStream(self, connection, response, sock)
        except _Failure as error:
            raise self.failure(error) from error

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        headers = {**self._headers, "accept": "application/json, text/event-stream"}
        if body is not None:
            headers["content-type"] = "application/json"
        connection.request(method, self._address.prefix + path, body, headers)
        return connection.getresponse()

    def failure(self, error: Exception) -> ServerError:
        """Return the error of a connection that cannot be made, or breaks."""
        name = self.name
        if isinstance(error, ssl.SSLCertVerificationError):
            return ServerError(
                f"{name}: expected a certificate that is trusted here, got: {error.verify_message}",
                hint="SSL_CERT_FILE names a file of certificates to trust",
            )
        if isinstance(error, ssl.SSLError):
            return ServerError(f"{name}: TLS fails: {error.reason or error}", hint="is it a server for http://?")
        if isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
            return self.stranger("something else than HTTP")
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ServerError(f"{name}: cannot be reached: {reason}", hint="does hybrid-k2 serve run there?")

    def refusal(self, status: int, content: Any, retry_after: str | None = None) -> ServerError:
        """Return the error of a response with a status that is none of success."""
        said = error_message(content) or http.client.responses.get(status, "no reason")
        if status == 401:
            return ServerError(
                f"{self.name}: {said}",
                hint="the key is taken from --api-key-file, --api-key or HYBRID_K2_API_KEY",
            )
        if 300 <= status < 400:
            return ServerError(f"{self.name}: expected an answer, got {status}: it is somewhere else")
        if status == 404 and error_message(content) is None:
            return self.stranger("404 Not Found")
        later = f"try again in {retry_after} s" if retry_after and retry_after.isdecimal() else None
        return ServerError(f"{self.name}: {status}: {said}", hint=later if status in (429, 503) else None)

    def stranger(self, got: str) -> ServerError:
        """Return the error of a server that is none of ours."""
        return ServerError(
            f"{self.name}: expected a server of hybrid-k2, got {got}",
            hint="give the address that hybrid-k2 serve prints",
        )


class EventStream:
    """The events of one response, up to `[DONE]`: iterate once, then close."""

    def __init__(
        self,
        server: Server,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        sock: socket.socket,
    ) -> None:
        self.server = server
        self._connection = connection
        self._response = response
        self._socket = sock

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects. Raises: ServerError: no JSON, an event `error`, or an end without `[DONE]`."""
        for data in self._events():
            if data == b"[DONE]":
                return
            try:
                frame = json.loads(data)
            except (ValueError, RecursionError):
                frame = None
            if not isinstance(frame, dict):
                raise ServerError(f"{self.server.name}: expected a JSON object in the stream, got {shown(data)}")
            if "error" in frame:
                raise ServerError(f"{self.server.name}: {error_message(frame) or 'the reply failed'}")
            yield frame
        raise ServerError(
            f"{self.server.name}: the connection broke in the middle of the reply",
            hint="the server was stopped, or the network failed; ask again",
        )

    def shut(self) -> None:
        """Hang up: who waits for an event meets the end of the stream. Safe in a signal handler."""
        with suppress(OSError):
            # not SSLSocket.shutdown, which takes away what a read that is going on works with
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the connection. Closing twice is fine."""
        self._response.close()
        self._connection.close()

    def _events(self) -> Iterator[bytes]:
        """Yield the data of each event: its lines `data:`, joined."""
        data: list[bytes] = []
        size = 0
        while line := self._line():
            name, _, value = line.rstrip(b"\r\n").partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
                size += len(value)
            elif not name and not value and data:
                yield b"\n".join(data)
                data, size = [], 0
            if len(line) >= _MAX_LINE_BYTES or size >= _MAX_LINE_BYTES:
                raise ServerError(f"{self.server.name}: expected events of less than {_MAX_LINE_BYTES} bytes")

    def _line(self) -> bytes:
        try:
            return self._response.readline(_MAX_LINE_BYTES)
        except (*_Failure, ValueError):  # reset, cut in the middle of a chunk, or no chunk at all: an end
            return b""


def read_json(response: http.client.HTTPResponse) -> Any:
    """Return the JSON of a response; None if it is none, or too large."""
    try:
        return json.loads(response.read(_MAX_BODY_BYTES))
    except (ValueError, RecursionError, http.client.IncompleteRead):
        return None


def error_message(content: Any) -> str | None:
    """Return the message of an error object."""
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) and message else None
