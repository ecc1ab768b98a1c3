"""The server process: where it listens, what it says, and how it ends."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from serve.app import create_app
from serve.connection import Connection
from serve.engine import Engine
from serve.gate import LOOPBACK
from stages.errors import UserError

KEY = "OLIVEPRESS_API_KEY"  # environment variable
STOP_SECONDS = 60  # that answers have to be finished in, after SIGTERM


class Server(uvicorn.Server):
    """uvicorn's, which says when it listens."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; uvicorn would also raise the signal again afterwards, and so fail."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes a free one.

    Raises:
        UserError: the address cannot be had, or others could reach it and there is no key.
    """
    if host not in LOOPBACK and not os.environ.get(KEY):
        raise UserError(f"--host {host}: others could ask this server; set {KEY} first")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port}: {why}; --port takes another") from None
    return found


def configured(engine: Engine, bound: socket.socket, on_start: Callable[[], None]) -> Server:
    """The server for a socket of `listen`, ready to run."""
    key = os.environ.get(KEY)
    # A page of another host cannot have the key, and a proxy asks under its own name.
    hosts = LOOPBACK if bound.getsockname()[0] in LOOPBACK and not key else None
    app = create_app(engine, key, hosts)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS,
        server_header=False, lifespan="on", ws="none", http=Connection,
    )  # fmt: skip
    return Server(config, on_start)


def run(engine: Engine, bound: socket.socket, on_start: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; what is being answered then is finished."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("olivepress.serve")
    log.handlers, log.level, log.propagate = [handler], logging.INFO, False
    configured(engine, bound, on_start).run([bound])
