"""Bodies of requests, read with a limit of bytes and of time."""

from __future__ import annotations

import asyncio
import time

from .errors import RequestError
from .limits import Limits

DRAINED = 4  # bodies' worth of bytes that are read and dropped, so that the client gets to read the refusal


async def read_body(request, limits: Limits) -> bytes:
    """The body. Raises RequestError 413 where it is too long, 408 where it is too slow."""
    length = request.headers.get("content-length", "")
    too_long = RequestError(413, f"the body must have at most {limits.body} bytes", None, "body_too_large")
    refused = length.isdigit() and (len(length) > 18 or int(length) > limits.body)
    end = time.monotonic() + limits.seconds
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), max(0.0, end - time.monotonic()))
        except asyncio.TimeoutError:
            raise RequestError(408, "the body came too slowly", None, "timeout") from None
        if message["type"] == "http.disconnect":
            raise RequestError(499, "the client went away")
        part = message.get("body", b"")
        size += len(part)
        refused = refused or size > limits.body
        if refused:
            parts.clear()
            if size > DRAINED * limits.body or not message.get("more_body", False):
                raise too_long
        else:
            parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
