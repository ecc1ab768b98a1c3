"""Whose turn it is to change this clone: a run, a pull or a repair, one at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

from stages.errors import UserError
from tasks import locks
from tasks.command import stopping

TMP = Path(".dvc/tmp")
TURN = TMP / "turn"
LOOK_SECONDS = 0.5  # between tries for the turn


class Busy(UserError):
    """Another process is at work in this clone."""


@contextlib.contextmanager
def turn(root: Path, on_wait: Callable[[str], None], what: str = "another run") -> Iterator[None]:
    """Be the one that changes this clone; wait for another that does.

    The kernel gives the turn back however this process ends.

    Args:
        on_wait: called with who is waited for.
        what: as others are told who has the turn.

    Raises:
        UserError: the caller of the stages was stopped meanwhile.
    """
    path, told = root / TURN, ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if (who := _who(file)) != told:
                    on_wait(who)
                    told = who
                if stopping.wait(LOOK_SECONDS):
                    raise UserError("stopped") from None
        file.truncate(0)
        json.dump({"pid": os.getpid(), "since": time.strftime("%H:%M:%S"), "what": what}, file)
        file.flush()
        yield


@contextlib.contextmanager
def alone(root: Path, what: str) -> Iterator[None]:
    """The turn, if nobody is at work here: no run, and no `dvc` command.

    Raises:
        Busy: with who is.
    """
    with turn(root, _refuse, what):
        if busy := locks.at_work(root / TMP):
            _refuse(f"process {min(busy)}")
        yield


def _refuse(who: str) -> NoReturn:
    raise Busy(f"{who} is at work: try again when that has ended")


def _who(file: IO[str]) -> str:
    file.seek(0)
    try:
        said = json.loads(file.read())
        return f"{said['what']} in this clone, process {said['pid']} since {said['since']}"
    except (ValueError, KeyError):  # it has only just begun
        return "another run in this clone"
