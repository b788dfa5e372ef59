"""One request of a client, on its way through the service: from the event loop to the service's thread and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from hybrid_k2.engine.reply import Reply
from hybrid_k2.engine.service_types import Failed, Finished, Piece, Progress, ServiceEvent, ServiceRequest
from hybrid_k2.errors import HybridK2Error, RequestError
from hybrid_k2.server.errors import api_error, shutting_down
from hybrid_k2.server.metrics import Metrics

if TYPE_CHECKING:
    from hybrid_k2.engine.service import Service, Ticket

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed the connection: nobody reads an answer."""


class Run:
    """Submit a request and read its events; leaving early, in any way, cancels it in the service."""

    def __init__(self, service: Service, metrics: Metrics, log: dict[str, Any]) -> None:
        """`log` takes what the log shall say about this request."""
        self.prompt_tokens = 0
        self._service = service
        self._metrics = metrics
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[ServiceEvent] = asyncio.Queue()
        self._ticket: Ticket | None = None
        self._choices = 1
        self._started = time.perf_counter()
        self._last_piece: dict[int, float] = {}

    async def submit(self, build: Callable[[], ServiceRequest]) -> None:
        """Build the request and hand it to the service, both in a thread: a long prompt takes time to encode.

        Raises: ApiError: the request is wrong, or too many wait.
        """
        work = asyncio.ensure_future(asyncio.to_thread(self._submit, build))
        try:
            self._ticket = await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_cancel_ticket)
            raise
        except HybridK2Error as error:
            self._note(error)
            refused = api_error(error)
            self._metrics.refused(refused)
            raise refused from error
        self.prompt_tokens = self._ticket.prompt_tokens
        self._log["prompt_tokens"] = self._log.get("prompt_tokens", 0) + self._ticket.prompt_tokens

    async def events(self) -> AsyncIterator[Progress | Piece | Finished]:
        """Yield the service's events; the last is the last choice's end.

        Raises: ApiError when the service fails or gives the request up.
        """
        try:
            left = self._choices
            while left:
                event = await self._events.get()
                if isinstance(event, Failed):
                    self._note(event.error)
                    raise api_error(event.error) from event.error
                if isinstance(event, Piece):
                    self._observe_piece(event.choice)
                elif isinstance(event, Finished):
                    left -= 1
                    self._observe_end(event.reply)
                    if event.reply.finish_reason == "cancelled":
                        raise shutting_down()
                yield event
        finally:
            self.cancel()

    async def replies(self) -> list[Reply]:
        """Wait for the replies of all choices, in their order. Raises: ApiError."""
        replies: dict[int, Reply] = {}
        async for event in self.events():
            if isinstance(event, Finished):
                replies[event.choice] = event.reply
        return [reply for _, reply in sorted(replies.items())]

    def cancel(self) -> None:
        """Free what the request holds in the service; after its end this does nothing."""
        if self._ticket is not None:
            self._ticket.cancel()

    def _note(self, error: HybridK2Error) -> None:
        """Let the log have the engine's own words, which the client does not get; those about a request quote it."""
        if not isinstance(error, RequestError):
            self._log["error"] = error.message

    def _submit(self, build: Callable[[], ServiceRequest]) -> Ticket:
        request = build()
        self._choices = request.n
        return self._service.submit(request, self._take)

    def _take(self, event: ServiceEvent) -> None:
        """Take an event on the service's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server has ended
            self.cancel()

    def _observe_piece(self, choice: int) -> None:
        now = time.perf_counter()
        last = self._last_piece.get(choice)
        self._metrics.piece(now - (self._started if last is None else last), first=last is None)
        if last is None and "first_token_s" not in self._log:
            self._log["first_token_s"] = round(now - self._started, 4)
        self._last_piece[choice] = now

    def _observe_end(self, reply: Reply) -> None:
        self._metrics.finished(reply, time.perf_counter() - self._started)
        self._log["cached_tokens"] = reply.usage.cached_tokens
        self._log["completion_tokens"] = self._log.get("completion_tokens", 0) + reply.usage.completion_tokens
        self._log["finish_reason"] = reply.finish_reason


def _cancel_ticket(work: asyncio.Future[Ticket]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().cancel()


async def disconnected(receive: Receive) -> None:
    """Return when the client has gone; to be used when the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work of a request, and stop it when the client goes. Raises: ClientGoneError, and what the work raises."""
    return await first_of(work, disconnected(request.receive))


async def first_of(work: Coroutine[Any, Any, Result], gone: Awaitable[None]) -> Result:
    """Return the result of `work`, or cancel it when `gone` comes first. Raises: ClientGoneError."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
