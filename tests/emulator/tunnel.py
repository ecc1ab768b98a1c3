"""The proxy that a client's HTTPS_PROXY names: it opens Azure's hosts, and nothing else."""

from __future__ import annotations

import asyncio
import ssl
import time
from fnmatch import fnmatch

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .gate import Gate

IDLE_SECONDS = 60
HEAD_BYTES = 1 << 14
OK = b"HTTP/1.1 200 Connection established\r\n\r\n"
REFUSED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Http(H11Protocol):
    """uvicorn's side of one connection, which may get bytes before it hears of the connection."""

    early = b""

    def __init__(self, app: ASGIApp) -> None:
        config = Config(
            app,
            lifespan="off",
            log_config=None,
            log_level="critical",
            timeout_keep_alive=IDLE_SECONDS,
            server_header=False,
        )
        config.load()
        super().__init__(config, ServerState(), {})

    def data_received(self, data: bytes) -> None:
        if self.transport is None:
            self.early += data
        else:
            super().data_received(data)


class Tunnel(asyncio.Protocol):
    """One connection: takes CONNECT, ends TLS itself with a certificate for all hosts, serves.

    Args:
        gate: what serves the requests inside.
        hosts: the patterns of the hosts that are opened; all others are refused and logged.
        context: the server's side of TLS.
    """

    def __init__(self, gate: Gate, hosts: tuple[str, ...], context: ssl.SSLContext) -> None:
        self.gate, self.hosts, self.context = gate, hosts, context
        self.head = b""
        self.task: asyncio.Task[None] | None = None  # the loop itself keeps only a weak reference

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.head += data
        if b"\r\n\r\n" not in self.head and len(self.head) < HEAD_BYTES:
            return
        method, target, *_ = [*self.head.decode("latin-1").split(" ", 2), "", ""]
        host, _, port = target.partition(":")
        if method == "CONNECT" and port == "443" and any(fnmatch(host, n) for n in self.hosts):
            self.transport.write(OK)
            self.task = asyncio.ensure_future(self._serve())
            return
        self.gate.record(
            time=time.time(), method=method, host=host, path="", query="", status=403, note="tunnel"
        )
        self.transport.write(REFUSED)
        self.transport.close()

    async def _serve(self) -> None:
        inner = Http(self.gate)
        loop = asyncio.get_running_loop()
        try:
            secure = await loop.start_tls(self.transport, inner, self.context, server_side=True)
        except (OSError, EOFError):  # ssl.SSLError is an OSError
            self.transport.close()
            return
        assert secure
        inner.connection_made(secure)  # type: ignore[arg-type]
        if inner.early:
            inner.data_received(inner.early)
