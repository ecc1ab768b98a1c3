"""What every request passes before it is looked at: its size, its sender, and how errors look."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError

BODY_BYTES = 4 << 20
DRAINED_BYTES = 256 << 20  # of a body that is too large: who is cut off in it reads no answer
BODY_SECONDS = 60
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
OPEN = {"/", "/healthz"}  # what needs no key: a page without content of its own


class Gate:
    """Lets through what may be looked at, with its body read.

    Args:
        key: that requests must bring; None for none.
        hosts: names under which the server may be asked; None for any. On loopback this keeps out
            pages of other hosts whose names were made to mean this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: set[str] | None) -> None:
        self.app, self.key, self.hosts = app, key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check(scope, headers)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = replayed(await body(headers, receive), receive)
            await self.app(scope, receive, sending)
        except ApiError as error:
            if not begun:
                await answer(send, error)
        except Exception:
            if begun:
                raise
            await answer(send, ApiError(500, "The server made a mistake; its log says more"))
            raise

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self.hosts is not None and host_of(headers.get("host", "")) not in self.hosts:
            raise ApiError(403, "This server is asked as localhost only")
        if self.key and scope["path"] not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self.key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(
                    401, "Wrong or no API key: Authorization: Bearer KEY", code="invalid_api_key"
                )
        # Other types can be sent by the page of another host without asking.
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "Content-Type must be application/json")


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


async def body(headers: Headers, receive: Receive) -> bytes:
    """The whole body of a request.

    Raises:
        ApiError: it is too large, or does not come.
    """
    length = headers.get("content-length", "")
    asks_first = headers.get("expect", "").lower() == "100-continue"
    large = length.isdigit() and int(length) > BODY_BYTES
    too_large = ApiError(413, f"The body may have {BODY_BYTES} bytes", code="body_too_large")
    if large and asks_first:
        raise too_large
    parts, count = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "The client went away")
                count += len(message.get("body", b""))
                if count <= BODY_BYTES:
                    parts.append(message.get("body", b""))
                else:
                    parts.clear()
                if count > DRAINED_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise ApiError(408, f"The body did not come in {BODY_SECONDS} seconds") from None
    if count > BODY_BYTES:
        raise too_large
    return b"".join(parts)


def replayed(whole: bytes, receive: Receive) -> Receive:
    """As `receive`, with the body once more before what is still to come."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": whole, "more_body": False}

    return again


async def answer(send: Send, error: ApiError) -> None:
    data = json.dumps(error.body(), ensure_ascii=False).encode("utf-8", "replace")
    headers: list[tuple[bytes, Any]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        *((key.lower().encode(), value.encode()) for key, value in error.headers.items()),
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
