"""A stage that others may want too: waited for, fetched, or run here and sent to the others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from stages.errors import UserError
from tasks import remote
from tasks.pool.claims import Claims

T = TypeVar("T")
REMOTE_SECONDS = 300.0  # for a remote that is away
AGAIN_SECONDS = 5.0


@dataclass
class Turn:
    """As `tasks.bridge.Turn`."""

    ran: bool = False


@dataclass
class Flight:
    """The stages of one flow run, among those of all runs on the same server.

    Args:
        root: the folder it works in.
        claims: of the flow run.
        remote: the DVC remote through which machines share; None where they share a cache.
        on_line: called with what is waited for.
    """

    root: Path
    claims: Claims
    remote: str | None
    on_line: Callable[[str], None]

    @contextlib.contextmanager
    def turn(self, stage: str, key: str) -> Iterator[Turn]:
        """As `tasks.bridge.Flight`."""

        def waits(claim: object) -> None:
            self.on_line(f"{stage}: waits for {getattr(claim, 'machine', '?')}, which makes it")

        with self.claims.held(key, waits):
            if self.remote:
                name = self.remote
                self._patiently(lambda: remote.fetch_run(self.root, key, remote=name))
            turn = Turn()
            yield turn
            if turn.ran and self.remote:
                self._patiently(lambda: remote.push(self.root, [stage], remote=self.remote))

    def _patiently(self, move: Callable[[], T]) -> T:
        """Move something; tried again while the remote is away.

        Raises:
            UserError: it was away for `REMOTE_SECONDS`.
        """
        deadline = time.monotonic() + REMOTE_SECONDS
        while True:
            try:
                return move()
            except UserError as error:
                if time.monotonic() > deadline:
                    raise
                self.on_line(f"{error}; again in {AGAIN_SECONDS:g} s")
                time.sleep(AGAIN_SECONDS)
