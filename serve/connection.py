"""A connection that ends if nothing comes, or if what is sent is not read."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30  # in which a request's headers have to be there, or more of a refused body
READ_SECONDS = 60  # in which a client has to take something of what waits for it


class Connection(H11Protocol):
    """uvicorn's, whose own time limit is only for the pause between two requests."""

    _silent: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(0)  # so that `pause_writing` tells of any unsent byte
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
        self._watch()

    def _watch(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(READ_SECONDS, self._end_if_unread, unsent)

    def _end_if_unread(self, unsent: int) -> None:
        if self.transport.get_write_buffer_size() < unsent:
            self._watch()
        else:
            self.transport.abort()

    def resume_writing(self) -> None:
        self._cancel_watch()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_watch()
        if self._silent:
            self._silent.cancel()
        super().connection_lost(exc)

    def _cancel_watch(self) -> None:
        if self._unread:
            self._unread.cancel()
            self._unread = None
