"""The processes of one clone, by what they are, from /proc."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

MARK = "CHAOS_FOLDER"
# The first that its command line fits.
KINDS = {
    "hook": r"_workspace_runtime_bootstrap\.py hook",  # the worker's, after a flow that crashed
    "server": r"prefect_server server start",
    "worker": r"prefect worker start|olivepress worker",
    "stage": r"-m stages\.|stage\.py",
    "dvc": r"/dvc( |$)|-m dvc ",
    "flow": r"olivepress run|prefect\.engine|flow_engine|prefect flow-run execute",
    "client": r"prefect deployment run",  # which watches a worker's run, and is not it
}


@dataclass(frozen=True)
class Process:
    """A process of the clone."""

    pid: int
    kind: str
    command: str

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def of(folder: Path) -> list[Process]:
    """Those that were started with `MARK` in their environment, and all that those started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if f"{MARK}={folder}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            found.append(Process(int(entry.name), kind_of(command), command))
    return found


def kind_of(command: str) -> str:
    return next((kind for kind, text in KINDS.items() if re.search(text, command)), "other")
