"""Between HTTP and the rest: bodies read within limits, the key, server-sent events, and what is counted."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_bitlm.serving.errors import ApiError
from megatron_bitlm.serving.metrics import Metrics

Result = TypeVar("Result")

BODY_TIMEOUT_S = 30.0
CLIENT_GONE_STATUS = 499  # nginx's; nobody reads it
_DRAINED_BODIES = 4  # limits' worth of a body that is too large, read and dropped before the refusal is sent


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a JSON request.

    A body over the limit is dropped as it comes, so that a client still sending gets to read the refusal; a much larger
    one loses its connection.

    Raises:
        ApiError: 415 for another content type, 413 over the limit, 408 where it does not come.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type must be application/json, got {kind or 'none'}")
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes * _DRAINED_BODIES:
        raise too_large

    async def read() -> bytes:
        body, num_bytes = bytearray(), 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes * _DRAINED_BODIES:
                raise too_large
            if num_bytes <= max_bytes:
                body += chunk
        if num_bytes > max_bytes:
            raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_TIMEOUT_S)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise ApiError(408, f"the body did not come within {BODY_TIMEOUT_S:.0f} s") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client left before its body was whole") from error


def check_key(request: Request, api_key: str | None) -> None:
    """Raise ApiError 401 where a key is wanted and another or none is given; the comparison takes constant time."""
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if not hmac.compare_digest(given.strip().encode(), api_key.encode()) or scheme.lower() != "bearer":
        raise ApiError(401, "a valid API key is needed: send it as `Authorization: Bearer KEY`", code="invalid_api_key")


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has left; there is nobody to answer."""


async def while_connected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Run what a client waits for, and end it when the client leaves; for requests whose body has been read.

    Raises:
        ClientGone: It has left.
    """

    async def until_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    own, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_disconnect())
    try:
        await asyncio.wait([own, gone], return_when=asyncio.FIRST_COMPLETED)
        if own.done():
            return own.result()
        raise ClientGone
    finally:
        for task in (own, gone):
            task.cancel()
        await asyncio.gather(own, gone, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events.

    Args:
        chunks: The events.
        close: Called at the end, also where the client left before the first event.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self.close = chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks as they come."""

        async def pump() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in self.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await while_connected(pump(), receive)
        except ClientGone:
            pass  # the middleware counts it
        finally:
            await self.chunks.aclose()
            self.close()


class CountRequests:
    """ASGI middleware: every answer by path and status, its time, and the clients that left."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count what is sent."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start, is_whole = 0, time.perf_counter(), False

        async def counted(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_whole = is_whole or (message["type"] == "http.response.body" and not message.get("more_body", False))

        try:
            await self.app(scope, receive, counted)
        except Exception:
            status, is_whole = 500, True
            raise
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            if is_whole and status != CLIENT_GONE_STATUS:
                self.metrics.requests.labels(path, str(status)).inc()
                self.metrics.request_seconds.labels(path).observe(time.perf_counter() - start)
            else:
                self.metrics.disconnects.inc()
