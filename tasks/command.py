"""A stage's command as a process: streamed, held to a time limit, and stopped as a whole."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEPT_LINES = 200  # of what a stage printed, for its last words

_threads: set[int] = set()  # that work on a stage
_groups: set[int] = set()  # process groups that are running
_stopping = threading.Event()


@dataclass
class Job:
    """What a thread does for one stage; it may turn out that there is no command to run.

    Args:
        on_line: called with each line the command prints, from the thread that runs it.
        limit_seconds: its process group is killed after this long.
        env: added to the command's environment.
    """

    on_line: Callable[[str], None]
    limit_seconds: float
    env: dict[str, str]
    lines: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    timed_out: bool = False

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Let `stages_end_with_caller` wait for this thread."""
        _threads.add(threading.get_ident())
        try:
            yield
        finally:
            _threads.discard(threading.get_ident())

    def run(self, argv: list[str], env: dict[str, str], **kwargs: Any) -> int:
        """Run a command to its end, with this Python first on its path; return its exit code."""
        if _stopping.is_set():
            return -signal.SIGTERM
        path = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
        program = shutil.which(argv[0], path=path) or argv[0]
        self.process = subprocess.Popen(
            [program, *argv[1:]],
            env={**env, **self.env, "PATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # one process group, so that a stop reaches all of it
            **kwargs,
        )
        group = self.process.pid
        _groups.add(group)
        timer = threading.Timer(self.limit_seconds, self._out_of_time)
        timer.start()
        try:
            for line in self.process.stdout or ():
                self.lines = [*self.lines[1 - KEPT_LINES :], line.rstrip()]
                self.on_line(line.rstrip())
            return self.process.wait()
        finally:
            timer.cancel()
            _kill(group)  # anything it left behind
            _groups.discard(group)

    def _out_of_time(self) -> None:
        self.timed_out = True
        if self.process:
            _kill(self.process.pid)

    def last_words(self, stage: str) -> str | None:
        """Why the command failed, in its own words; None when it did not."""
        if self.process is None or not self.process.returncode:
            return None
        if self.timed_out:
            return f"{stage}: stopped after its time limit of {self.limit_seconds / 60:g} minutes"
        said = [line for line in self.lines if line.strip() and not parse_progress(line)]
        own = re.compile(rf"{re.escape(stage.partition('@')[0])}(@[\w-]+)?: ")  # stages.stage.run's
        starts = [i for i, line in enumerate(said) if own.match(line)]
        if starts:
            return "\n".join(said[starts[-1] :])
        code = self.process.returncode
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{stage}: {said[-1] if said else 'it said nothing'} ({ended})"


_PROGRESS = re.compile(r"progress (\d+)/(\d+) ?(.*)")


def parse_progress(line: str) -> tuple[int, int, str] | None:
    """(done, total, note) of a stage's progress line, None for any other line."""
    match = _PROGRESS.fullmatch(line)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def stages_end_with_caller() -> Iterator[None]:
    """Kill what runs, and start nothing more, when the caller is stopped or fails."""
    try:
        yield
    except BaseException:
        _stopping.set()
        deadline = time.monotonic() + 30
        while _threads and time.monotonic() < deadline:
            for group in list(_groups):
                _kill(group)
            time.sleep(0.05)
        _stopping.clear()
        raise
