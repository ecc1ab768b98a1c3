"""A connection that ends if nothing comes, or if what is sent is not read."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30  # in which a request's headers have to be there
READ_SECONDS = 60  # in which a client has to take something of a full buffer


class Connection(H11Protocol):
    """uvicorn's, whose own time limit is only for the pause between two requests."""

    _silent: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_headers()

    def _expect_headers(self) -> None:
        asked = self.cycle is not None and not self.cycle.response_complete
        if asked and self._silent:
            self._silent.cancel()
            self._silent = None
        elif not asked and not self._silent:
            self._silent = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._let_go()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go()
        if self._silent:
            self._silent.cancel()
        super().connection_lost(exc)

    def _let_go(self) -> None:
        if self._stuck:
            self._stuck.cancel()
            self._stuck = None
