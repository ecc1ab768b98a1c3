"""Single flight: of all the machines of a pool one computes a stage, and the others wait for it.

A claim is a Prefect variable that is named after the stage's key. The server makes a name once, so
of two who want it one gets it; and it is a row of the server's database, so it outlives a restart,
which the leases of Prefect's concurrency limits do not in the server's default set-up. It names the
flow run that holds it. Each run shows that it lives by a variable of its own that counts up; one
whose count stands still while the server answers has lost its machine, and its claims are free.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import VariableCreate, VariableUpdate
from prefect.client.schemas.objects import Variable
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

from stages.errors import UserError
from tasks.command import stopping

T = TypeVar("T")
PULSE_SECONDS = 5.0
DEAD_SECONDS = 30.0  # six pulses
WAIT_SECONDS = 1.0  # between looks at somebody else's claim
SERVER_SECONDS = 600.0  # for a server that is away
CLEAN_UP_SECONDS = 30.0  # the same, when all is lost anyway
LOOK_SECONDS = 10.0  # that one look stands for at most


def patiently(call: Callable[[SyncPrefectClient], T], seconds: float = SERVER_SECONDS) -> T:
    """What a call to the server gives; tried again while the server is away or overloaded.

    Raises:
        UserError: it was away for so many seconds.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with get_client(sync_client=True) as client:
                return call(client)
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500:
                raise UserError(f"the Prefect server refuses: {error}") from None
            if time.monotonic() > deadline:
                raise UserError(f"the Prefect server is away: {error}") from None
            pause(1)


def pause(seconds: float) -> None:
    """Wait, unless the caller of the stages is stopped.

    Raises:
        UserError: it is.
    """
    if stopping.wait(seconds):
        raise UserError("stopped")


def _pulse_name(run: str) -> str:
    return f"olivepress-pulse-{run}"


class Pulse:
    """Shows that a flow run lives, from a thread, until the end of the block.

    Args:
        run: its id.
        on_lost: called once when another has declared it dead, from that thread.
        and_look: called at each beat.
    """

    def __init__(
        self,
        run: str,
        on_lost: Callable[[], None] = lambda: None,
        and_look: Callable[[SyncPrefectClient], None] = lambda client: None,
    ) -> None:
        self.name = _pulse_name(run)
        self.on_lost, self.and_look = on_lost, and_look
        self._ended = threading.Event()
        # The context holds Prefect's settings.
        self._thread = threading.Thread(target=copy_context().run, args=(self._beat,), daemon=True)

    def __enter__(self) -> Pulse:
        first = VariableCreate(name=self.name, value=0)
        with contextlib.suppress(ObjectAlreadyExists):  # the run is tried again
            patiently(lambda client: client.create_variable(first))
        self._thread.start()
        return self

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(PULSE_SECONDS):
            count += 1
            try:
                with get_client(sync_client=True) as client:
                    client.update_variable(VariableUpdate(name=self.name, value=count))
                    self.and_look(client)
            except PrefectHTTPStatusError as error:
                if error.response.status_code == httpx.codes.NOT_FOUND:
                    self.on_lost()
                    return
            except httpx.TransportError:
                pass  # those who watch do not count the time without a server

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with contextlib.suppress(UserError):
            patiently(lambda client: _delete_name(client, self.name), CLEAN_UP_SECONDS)


def _delete_name(client: SyncPrefectClient, name: str) -> None:
    with contextlib.suppress(ObjectNotFound):
        client.delete_variable_by_name(name)


@dataclass
class Watch:
    """Tells which flow runs have lost their machine, by looking at their pulses now and then."""

    _seen: dict[str, tuple[object, float, float]] = field(default_factory=dict)

    def alive(self, client: SyncPrefectClient, run: str) -> bool:
        """Whether a run's pulse was seen to change in the last `DEAD_SECONDS`.

        Each look stands for the time since the one before, but for no more than `LOOK_SECONDS`: the
        server may have been away, and the pulses with it.
        """
        found = client.read_variable_by_name(_pulse_name(run))
        value = found.value if found else None
        now = time.monotonic()
        before, looked, still = self._seen.get(run, (object(), now, 0.0))
        still = still + min(now - looked, LOOK_SECONDS) if value == before else 0.0
        self._seen[run] = (value, now, still)
        return still < DEAD_SECONDS

    def forget(self, client: SyncPrefectClient, run: str) -> None:
        """Take a run's pulse away, so that it ends itself should it live after all."""
        self._seen.pop(run, None)
        _delete_name(client, _pulse_name(run))


@dataclass(frozen=True)
class Claim:
    """A right to compute a stage."""

    id: UUID
    run: str
    machine: str


@dataclass
class Claims:
    """The claims of one flow run.

    Args:
        run: its id, which has a `Pulse`.
        machine: where it is, for those who wait.
    """

    run: str
    machine: str

    @contextlib.contextmanager
    def held(self, key: str, on_wait: Callable[[Claim], None]) -> Iterator[None]:
        """Hold the claim on a stage key, 64 hex digits, waiting as long as another lives with it.

        Args:
            key: of the stage.
            on_wait: called for each other holder that is waited for.
        """
        claim = self._take(key, on_wait)
        try:
            yield
        finally:
            with contextlib.suppress(UserError):  # one that stays is free once this run has ended
                patiently(lambda client: _delete(client, claim), CLEAN_UP_SECONDS)

    def _take(self, key: str, on_wait: Callable[[Claim], None]) -> Claim:
        watch, told = Watch(), None
        name = f"olivepress-stage-{key}"
        value = {"run": self.run, "machine": self.machine}
        while True:
            claim = patiently(lambda client: _create(client, name, value))
            if claim.run == self.run:
                return claim
            if claim.id != told:
                told = claim.id
                on_wait(claim)
            if patiently(partial(watch.alive, run=claim.run)):
                pause(WAIT_SECONDS)
            else:
                patiently(partial(_delete, claim=claim))


def _create(client: SyncPrefectClient, name: str, value: dict[str, str]) -> Claim:
    """The claim of this name, ours or another's."""
    while True:
        try:
            return _claim(client.create_variable(VariableCreate(name=name, value=value)))
        except ObjectAlreadyExists:
            found = client.read_variable_by_name(name)
            if found:  # else it was given up just now
                return _claim(found)


def _claim(variable: Variable) -> Claim:
    value: Any = variable.value
    return Claim(variable.id, value["run"], value["machine"])


def _delete(client: SyncPrefectClient, claim: Claim) -> None:
    """By id: under the same name there may be the next one's by now."""
    try:
        client.request("DELETE", "/variables/{id}", path_params={"id": claim.id})
    except PrefectHTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise
