"""Every call passes here: to the service of its host, through the faults, into the log."""

from __future__ import annotations

import asyncio
import json
import re
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import ServiceError
from .faults import Fault

SECRET = re.compile(r"\b(sig|skoid|client_secret)=[^&]*")


class Cut(Exception):
    """The connection was closed on purpose."""


class Gate:
    """An ASGI application in front of the services.

    Args:
        log: a file that gets a line of JSON for each call; its secrets are taken out.
    """

    def __init__(self, log: Path) -> None:
        self.services: list[tuple[str, ASGIApp]] = []
        self.faults: list[Fault] = []
        self.calls: list[dict[str, Any]] = []
        self._log = log.open("a", buffering=1)

    def record(self, **call: Any) -> None:
        """Add a call to the log."""
        self.calls.append(call)
        self._log.write(json.dumps(call) + "\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope["headers"]).get(b"host", b"").decode().partition(":")[0]
        query = SECRET.sub(r"\1=-", scope["query_string"].decode())
        target = f"{scope['path']}?{query}" if query else scope["path"]
        call = {"method": scope["method"], "host": host, "path": scope["path"], "query": query}
        started = time.monotonic()
        fault = next((f for f in self.faults if f.takes(scope["method"], host, target)), None)
        exchange = Exchange(receive, send, fault or Fault(), scope["method"] == "HEAD")
        try:
            await self._answer(host, scope, exchange, fault)
        except Cut:
            exchange.status = 0
        except Exception:
            traceback.print_exc()  # into the emulator's own log
            raise
        finally:
            self.record(
                time=time.time(),
                **call,
                status=exchange.status,
                received=exchange.received,
                sent=exchange.sent,
                seconds=round(time.monotonic() - started, 3),
                note=fault.note() if fault else exchange.note,
            )

    async def _answer(
        self, host: str, scope: Scope, exchange: Exchange, fault: Fault | None
    ) -> None:
        if fault:
            await asyncio.sleep(fault.delay)
            if fault.status:
                await exchange.drain()
                return await exchange.reply(fault.status, fault.body, fault.headers)
        service = next((app for name, app in self.services if fnmatch(host, name)), None)
        if service is None:
            refusal = ServiceError(404, "UnknownHost", f"{host} is not played here.").response()
            return await refusal(scope, exchange.receive, exchange.send)
        await service(scope, exchange.receive, exchange.send)


class Exchange:
    """One call's two streams, counted, and cut or spoilt where a fault says so."""

    def __init__(self, receive: Receive, send: Send, fault: Fault, head: bool) -> None:
        self._receive, self._send, self._fault, self._head = receive, send, fault, head
        self.received = self.sent = self.status = 0
        self.note = ""
        self._closed = False

    def _close(self) -> None:
        self._closed = True
        # uvicorn's cycle of request and response, whose method `receive` is.
        self._receive.__self__.transport.close()  # type: ignore[attr-defined]
        raise Cut

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        if self._fault.cut_request is not None and self.received >= self._fault.cut_request:
            self._close()
        return message

    async def drain(self) -> None:
        """Read the rest of the request, as a client may only listen after it."""
        while (await self.receive()).get("more_body"):
            pass

    async def send(self, message: Message) -> None:
        if self._closed:  # a service that answers the broken request
            raise Cut
        if message["type"] == "http.response.start":
            self.status = message["status"]
            codes = [v for k, v in message.get("headers", []) if k.lower() == b"x-ms-error-code"]
            self.note = codes[0].decode() if codes else ""
            return await self._send(message)
        body = bytes(message.get("body", b""))
        start, self.sent = self.sent, self.sent + len(body)
        place = self._fault.corrupt
        if place is not None and start <= place < self.sent:
            place -= start
            body = body[:place] + bytes([body[place] ^ 0xFF]) + body[place + 1 :]
        cut = self._fault.cut_response
        if cut is not None and (self.sent >= cut or not message.get("more_body")):
            await self._send({**message, "body": body[: cut - start], "more_body": True})
            self._close()
        await self._send({**message, "body": body})

    async def reply(self, status: int, body: Any, headers: dict[str, str]) -> None:
        """Answer in the service's place."""
        text = body if isinstance(body, str) else "" if body is None else json.dumps(body)
        kind = "application/json" if not isinstance(body, str) else "text/plain"
        all_headers = {"content-type": kind, **headers, "content-length": str(len(text.encode()))}
        pairs = [(k.lower().encode(), v.encode()) for k, v in all_headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        data = b"" if self._head else text.encode()
        await self.send({"type": "http.response.body", "body": data})


class Control:
    """The ASGI application for tests, on a port of its own without TLS.

    Args:
        gate: whose calls and faults it shows and sets.
        look: what else can be read, by path.
        act: what else can be done by POST, by path; each gets the JSON in the request.
    """

    def __init__(
        self,
        gate: Gate,
        look: dict[str, Callable[[dict[str, str]], Awaitable[Any]]],
        act: dict[str, Callable[[Any], Awaitable[Any]]],
    ) -> None:
        self.gate, self.look, self.act = gate, look, act

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        request = Request(scope, receive)
        key = request.url.path
        if request.method == "POST" and key == "/faults":
            self.gate.faults.append(Fault(**await request.json()))
            answer: Any = len(self.gate.faults)
        elif request.method == "POST" and key in self.act:
            answer = await self.act[key](await request.json())
        elif key == "/calls":
            answer = self.gate.calls
        elif key == "/faults":
            answer = [asdict(fault) for fault in self.gate.faults]
        elif key in self.look:
            answer = await self.look[key](dict(request.query_params))
        else:
            return await JSONResponse("no such thing", 404)(scope, receive, send)
        await JSONResponse(answer)(scope, receive, send)
