"""A block that may take no more than so long, and so much memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TooLong(Exception):
    """The time is over."""


@contextmanager
def bounded(seconds: float, megabytes: int) -> Iterator[None]:
    """Raise TooLong or MemoryError in a block that takes more.

    The time holds in the main thread alone, the memory on Linux.
    """
    with _alarm(seconds), _limit(megabytes):
        yield


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise TooLong

    handler = signal.signal(signal.SIGALRM, ring)
    # Again and again: Python drops what is raised while it collects garbage.
    before = signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)  # that of a test, for instance
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def _limit(megabytes: int) -> Iterator[None]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + (megabytes << 20)
    if before != resource.RLIM_INFINITY:
        most = min(most, before)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
