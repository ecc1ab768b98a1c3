"""A stage that others may want too: waited for, fetched, or run here and sent to the others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger

from stages.errors import UserError
from tasks import remote
from tasks.pool.claims import Claim, Claims, pause

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
    """

    root: Path
    claims: Claims
    remote: str | None
    _answered: bool = False
    """Whether the remote has: then it is not asked again before each stage."""

    @contextlib.contextmanager
    def turn(self, stage: str, key: str) -> Iterator[Turn]:
        """As `tasks.bridge.Flight`."""

        def waits(claim: Claim) -> None:
            get_run_logger().info("%s: waits for %s, which makes it", stage, claim.machine)

        with self.claims.held(key, waits):
            self._patiently(remote.fetch_run, key)
            turn = Turn()
            yield turn
            if turn.ran:
                self._patiently(remote.push, [stage])

    def send(self, stages: list[str]) -> None:
        """Send what stages made that the remote does not have, also of earlier runs here.

        Raises:
            UserError: the remote was away for `REMOTE_SECONDS`.
        """
        if stages:
            self._patiently(remote.push, stages)

    def _patiently(self, move: Callable[..., Any], what: Any) -> None:
        """Move something to or from the remote; tried again while that is away.

        Raises:
            UserError: it was away for `REMOTE_SECONDS`.
        """
        deadline = time.monotonic() + REMOTE_SECONDS
        while self.remote:
            probe = None if self._answered else remote.PROBE_SECONDS
            try:
                move(self.root, what, remote=self.remote, probe_seconds=probe)
                self._answered |= move is remote.push  # before, it may be empty
                return
            except remote.DamagedHere:
                raise
            except UserError as error:
                self._answered = False
                if time.monotonic() > deadline:
                    raise
                get_run_logger().warning("%s; again in %g s", error, AGAIN_SECONDS)
                pause(AGAIN_SECONDS)
