"""Chat completions over HTTP: whole or as a stream, for clients that may be slow or go away."""

from __future__ import annotations

import asyncio
import logging
import time

from .bodies import read_body
from .errors import RequestError, request_error
from .generation import Answered, Cancelled, Generation
from .protocol import chat_request, parse_json
from .responses import DONE, Completion, event
from .service import Service
from .tokens import Access

logger = logging.getLogger(__name__)


async def respond(service: Service, request, access: Access):
    """The response to POST /v1/chat/completions. Raises RequestError."""
    deadline = time.monotonic() + service.limits.seconds
    body = await read_body(request, service.limits)
    asked = chat_request(await service.read(parse_json, body), service.name)
    generation = service.generation(asked, access, deadline)
    exchange = _Exchange(service, request, access, generation)
    return await (exchange.stream() if asked.stream else exchange.whole())


class _Exchange:
    """One request while it is answered: the generation, and a watch on the client."""

    def __init__(self, service: Service, request, access: Access, generation: Generation):
        self._service, self._request, self._generation = service, request, generation
        self._events: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: str) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, piece)

        generation.on_text = tell
        self._work = asyncio.create_task(service.answer(generation, access))
        # The end of the work comes after its last piece: both pass through the loop's own order.
        self._work.add_done_callback(lambda _: self._events.put_nowait(None))
        self._gone = asyncio.create_task(_client_gone(request))
        self._gone.add_done_callback(lambda _: self._work.cancel())

    async def whole(self):
        from starlette.responses import JSONResponse

        try:
            answered = await self._answered()
        finally:
            self._gone.cancel()
        return JSONResponse(Completion(self._service.name).whole(answered))

    async def stream(self):
        """The status waits for the first piece, so that what goes wrong until then has its own."""
        try:
            first = await self._events.get()
            if first is None:
                await self._answered()
        except BaseException:
            self._close()
            raise
        return _EventStream(self._events_of_stream(first), self._service.limits.seconds, self._close)

    async def _events_of_stream(self, piece: str | None):
        completion = Completion(self._service.name)
        yield completion.first()
        while piece is not None:
            if piece:
                yield completion.piece(piece)
            piece = await self._events.get()
        try:
            answered = await self._answered()
        except Exception as error:
            yield event(_as_request_error(error).to_dict())
            return
        yield completion.last(answered)
        if self._generation.request.include_usage:
            yield completion.usage(answered)
        yield DONE

    def _close(self) -> None:
        self._gone.cancel()
        self._work.cancel()

    async def _answered(self) -> Answered:
        try:
            return await asyncio.shield(self._work)
        except asyncio.CancelledError:
            if not self._work.cancelled():
                self._work.cancel()  # this task itself was cancelled: the server gives up
                raise
            raise RequestError(499, "the client went away") from None
        except Cancelled:
            raise RequestError(503, "the server is shutting down", None, "shutting_down") from None


class _EventStream:
    """A response of server-sent events. A client that does not read for too long is given up."""

    def __init__(self, events, seconds: float, close):
        self._events, self._seconds, self._close = events, seconds, close

    async def __call__(self, scope, receive, send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for part in self._events:
                message = {"type": "http.response.body", "body": part, "more_body": True}
                await asyncio.wait_for(send(message), self._seconds)
            await send({"type": "http.response.body", "body": b""})
        except asyncio.TimeoutError:
            logger.info("a client did not read its answer")  # the server then closes the connection
        finally:
            self._close()


async def _client_gone(request) -> None:
    """Returns when the client has closed the connection; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_request_error(error: Exception) -> RequestError:
    try:
        return request_error(error)
    except Exception:
        return RequestError(500, "the server failed; its log says why", None, "internal_error")
