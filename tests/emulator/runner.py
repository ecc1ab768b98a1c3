"""The cluster: runs a job's command as a process on this machine, and keeps its log in a blob."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.stage import killed_with_parent

from .answers import now
from .blobs import Blobs

ARTIFACTS = "azureml"  # the container of every run's files
LOG = "user_logs/std_log.txt"
LOG_SECONDS = 1.0
KILL_SECONDS = 5
QUOTA = (
    "ClusterCoreQuotaReached",
    "Operation results in exceeding quota limits of Core. Maximum allowed: 0, Current in use: 0, "
    "Additional requested: 24.",
)
ENDED = ("Completed", "Failed", "Canceled")
INPUT = re.compile(r"\$\{\{\s*inputs\.(\w+)\s*\}\}")


@dataclass
class Cluster:
    """How the cluster behaves; a test changes it."""

    quota: bool = False
    """There is no quota for the nodes: every job fails before it starts."""
    queue_seconds: float = 0
    """How long a job waits for a node."""


@dataclass
class Job:
    """One submitted job and what became of it."""

    name: str
    properties: dict[str, Any]
    """As submitted, with defaults."""
    status: str = "Queued"
    created: str = field(default_factory=now)
    started: str | None = None
    ended: str | None = None
    error: tuple[str, str] | None = None
    """Code and message, when it failed."""
    task: asyncio.Task[None] | None = None
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def folder(self) -> str:
        """Where its files are in the container `azureml`."""
        return f"ExperimentRun/dcid.{self.name}"

    def end(self, status: str, error: tuple[str, str] | None = None) -> None:
        self.ended, self.error, self.status = now(), error, status


class Runner:
    """Takes jobs through their states.

    Args:
        home: each job works in a folder of its own below it.
        blobs: where its code comes from and its log goes.
        env: what a job's process needs to reach the emulator.
        cluster: what to do about nodes.
    """

    def __init__(self, home: Path, blobs: Blobs, env: Mapping[str, str], cluster: Cluster) -> None:
        self.home, self.blobs, self.env, self.cluster = home, blobs, env, cluster

    async def run(self, job: Job, code: tuple[str, str] | None) -> None:
        """Queued, then Running, then the end; `code` is the container and folder of its files."""
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(job.cancelled.wait(), self.cluster.queue_seconds)
            if job.cancelled.is_set():
                job.end("Canceled")
            elif self.cluster.quota:
                job.end("Failed", QUOTA)
            else:
                await self._start(job, code)
        except Exception as error:
            job.end("Failed", ("ServiceError", f"{type(error).__name__}: {error}"))
            raise

    async def _start(self, job: Job, code: tuple[str, str] | None) -> None:
        job.status = "Preparing"
        folder = self.home / job.name
        work = folder / "code"
        work.mkdir(parents=True)
        if code:
            await self._fetch(*code, work)
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", self._command(job)),
            cwd=work,
            env=self._environment(job, folder),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=killed_with_parent,
        )
        job.started, job.status = now(), "Running"
        stop = asyncio.create_task(self._stop_on_cancel(job, process))
        try:
            await self._copy_log(job, process)
            status = await process.wait()
        finally:
            stop.cancel()
            _kill(process, signal.SIGKILL)
        if job.cancelled.is_set():
            job.end("Canceled")
        elif status:
            job.end(
                "Failed",
                (
                    "UserError",
                    f"Execution failed. User process '/bin/bash' exited with status code {status}. "
                    f"Please check log file '{LOG}' for error details.",
                ),
            )
        else:
            job.end("Completed")

    @staticmethod
    def _command(job: Job) -> str:
        inputs = job.properties.get("inputs") or {}
        return INPUT.sub(lambda found: str(inputs[found[1]]["value"]), job.properties["command"])

    def _environment(self, job: Job, folder: Path) -> dict[str, str]:
        """A clean one, as on a node: nothing of the machine but its programs."""
        return {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            **self.env,
            "AZUREML_RUN_ID": job.name,
            **(job.properties.get("environmentVariables") or {}),
        }

    async def _fetch(self, container: str, prefix: str, work: Path) -> None:
        client = self.blobs.service.get_container_client(container)
        async for blob in client.list_blobs(name_starts_with=f"{prefix}/"):
            path = work / blob.name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            download = await client.download_blob(blob.name)
            with path.open("wb") as file:
                async for chunk in download.chunks():
                    file.write(chunk)

    async def _copy_log(self, job: Job, process: asyncio.subprocess.Process) -> None:
        """Append what the process says to the blob, every second, until it says no more."""
        await self.blobs.make(ARTIFACTS)
        blob = self.blobs.service.get_blob_client(ARTIFACTS, f"{job.folder}/{LOG}")
        await blob.create_append_blob()
        assert process.stdout
        said, last, more = b"", 0.0, True
        while more:
            try:
                async with asyncio.timeout(LOG_SECONDS):
                    chunk = await process.stdout.read(1 << 16)
                said, more = said + chunk, bool(chunk)
            except TimeoutError:
                pass
            if said and (not more or time.monotonic() - last >= LOG_SECONDS):
                await blob.append_block(said)
                said, last = b"", time.monotonic()

    @staticmethod
    async def _stop_on_cancel(job: Job, process: asyncio.subprocess.Process) -> None:
        await job.cancelled.wait()
        _kill(process, signal.SIGTERM)
        await asyncio.sleep(KILL_SECONDS)
        _kill(process, signal.SIGKILL)


def _kill(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a signal to all that the job started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
