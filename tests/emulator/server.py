"""A server that tests start, as a child process that ends with the block it is started in."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 120  # MLflow's takes 10 s on two cores, the others 2


class Server(AbstractContextManager):
    """A process and those it starts, as one group.

    Args:
        log: the file for what it prints.
    """

    stop_seconds: float = 15
    """Between SIGTERM and SIGKILL."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, command: Sequence[str | Path], ready: Callable[[], bool], **options: Any
    ) -> None:
        """Start it and wait until `ready`.

        Args:
            options: of `subprocess.Popen`.

        Raises:
            RuntimeError: it ended, or is not ready after START_SECONDS; with what it printed.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options
            )
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{command[0]} did not start: {self.log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it, by SIGTERM and by SIGKILL if that is not enough."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
