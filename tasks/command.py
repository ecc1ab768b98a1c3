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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.errors import NO_MEMORY, no_memory
from stages.redact import without_secrets
from stages.stage import CALLER, less_memory

KEPT_LINES = 200  # of what a stage printed, for its last words

_threads: set[int] = set()  # that work on a stage
_groups: dict[int, float] = {}  # process groups that are running, and their seconds of grace
stopping = threading.Event()  # who waits for something looks at it


@dataclass
class Job:
    """What a thread does for one stage; it may turn out that there is no command to run.

    Args:
        on_line: called with each line the command prints, less its secrets, from the thread that
            runs it.
        limit_seconds: its process group is killed after this long.
        env: added to the command's environment.
        quiet_seconds: it is killed after so long without a line; None for never.
        grace_seconds: between SIGTERM and the kill, when it is out of time or the caller stops.
        turn: what the command is run in, such as a turn on the GPU; waiting for it is not counted.
    """

    on_line: Callable[[str], None]
    limit_seconds: float
    env: dict[str, str]
    quiet_seconds: float | None = None
    grace_seconds: float = 0
    turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    lines: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    stopped: str | None = None
    _kills_before: int = 0

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
        with self.turn():
            return self._run(argv, env, **kwargs)

    def _run(self, argv: list[str], env: dict[str, str], **kwargs: Any) -> int:
        if stopping.is_set():
            return -signal.SIGTERM
        path = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
        program = shutil.which(argv[0], path=path) or argv[0]
        self.process = subprocess.Popen(
            [program, *argv[1:]],
            env={
                **{**env, **self.env, "PATH": path, "PYTHONUNBUFFERED": "1"},
                CALLER: str(os.getpid()),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # one process group, so that a stop reaches all of it
            **kwargs,
        )
        self._kills_before = _kills_for_memory()
        group = self.process.pid
        _groups[group] = self.grace_seconds
        self._heard = time.monotonic()
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), daemon=True).start()
        try:
            for line in self.process.stdout or ():
                self._heard = time.monotonic()
                said = without_secrets(line.rstrip())
                self.lines = [*self.lines[1 - KEPT_LINES :], said]
                self.on_line(said)
            return self.process.wait()
        finally:
            ended.set()
            _kill(group)  # anything it left behind
            _groups.pop(group, None)

    def _watch(self, ended: threading.Event) -> None:
        """Kill the command when it is out of time, or quiet for too long; `stopped` says which."""
        began = time.monotonic()
        while not ended.wait(0.1) and self.process:
            now = time.monotonic()
            if now - began > self.limit_seconds:
                self.stopped = f"its time limit of {self.limit_seconds / 60:g} minutes"
                if self.grace_seconds:
                    _terminate(self.process.pid)
                    ended.wait(self.grace_seconds)
            elif self.quiet_seconds and now - self._heard > self.quiet_seconds:
                self.stopped = f"{self.quiet_seconds:g} seconds in which nothing happened"
            if self.stopped:
                return _kill(self.process.pid)

    def last_words(self, stage: str) -> str | None:
        """Why the command failed, in its own words; None when it did not."""
        if self.process is None or not self.process.returncode:
            return None
        if self.stopped:
            return f"{stage}: stopped after {self.stopped}"
        code = self.process.returncode
        killed = code == -signal.SIGKILL and _kills_for_memory() > self._kills_before
        last = next((line for line in reversed(self.lines) if line.strip()), "")
        said = no_memory("\n".join(self.lines) if code < 0 else last)
        if said := NO_MEMORY if killed else said:
            return f"{stage}: {said}{less_memory(stage)}"
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return own_words(stage, self.lines, ended)


def _kills_for_memory() -> int:
    """Processes of this machine that the kernel has killed because memory ran out, ever."""
    try:
        counted = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(counted[1]) if counted else 0


def own_words(stage: str, lines: Iterable[str], ended: str) -> str:
    """What a stage that failed said of it: its message, else its last line and how it ended."""
    said = [line for line in lines if line.strip() and not parse_progress(line)]
    own = re.compile(rf"{re.escape(stage.partition('@')[0])}(@[\w-]+)?: ")  # stages.stage.run's
    starts = [i for i, line in enumerate(said) if own.match(line)]
    if starts:
        return "\n".join(said[starts[-1] :])
    return f"{stage}: {said[-1] if said else 'it said nothing'} ({ended})"


_PROGRESS = re.compile(r"progress (\d+)/(\d+) ?(.*)")


def parse_progress(line: str) -> tuple[int, int, str] | None:
    """(done, total, note) of a stage's progress line, None for any other line."""
    match = _PROGRESS.fullmatch(line)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def _terminate(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(leader, signal.SIGTERM)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def stages_end_with_caller() -> Iterator[None]:
    """Kill what runs, and start nothing more, when the caller is stopped or fails."""
    try:
        yield
    except BaseException:
        stopping.set()
        began = time.monotonic()
        while _threads and time.monotonic() < began + 30:
            for group, grace in list(_groups.items()):
                (_terminate if time.monotonic() < began + grace else _kill)(group)
            time.sleep(0.05)
        stopping.clear()
        raise
