"""A worker that takes the candidates its machine can make, and leaves the others to others."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from stages.errors import UserError
from tasks.pool.claims import patiently
from tasks.pool.deployment import asked, ensure, forget
from tasks.pool.machine import this_machine
from tasks.pool.runs import CLONE, clone, find
from tasks.pool.workspace import FOLDER, remove

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import WorkerFlowRunResponse

# A pool of processes has one kind of worker, and this takes its place.
warnings.filterwarnings("ignore", message="Type 'Worker' at", category=UserWarning)


class Worker(ProcessWorker):
    """Prefect's worker of processes, in a clone of the project.

    Args:
        root: the clone, in which the flow runs begin.
        options: as `ProcessWorker`.
    """

    type = "process"

    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(**options)
        self.root = root
        self._left: set[str] = set()

    async def _submit_scheduled_flow_runs(
        self, flow_run_response: list[WorkerFlowRunResponse]
    ) -> list[FlowRun]:
        """Prefect's, for those that this machine can make: nothing else lets a worker decline."""
        fit = [entry for entry in flow_run_response if self._can(entry.flow_run)]
        return await super()._submit_scheduled_flow_runs(fit)

    def _can(self, run: FlowRun) -> bool:
        lacks = this_machine(self.root).lacks(asked(run.job_variables))
        if lacks and str(run.id) not in self._left:
            self._left.add(str(run.id))
            self._logger.warning("%s is left to others: it needs %s", run.name, ", ".join(lacks))
        return not lacks

    async def run(
        self, flow_run: FlowRun, configuration: ProcessJobConfiguration, task_status: Any = None
    ) -> ProcessWorkerResult:
        """In the clone, and not in an empty folder."""
        configuration.working_dir = self.root
        await self.client.update_flow_run_labels(flow_run.id, {CLONE: clone(self.root)})
        return await super().run(flow_run, configuration, task_status)


def serve(root: Path, pool: str, limit: int, name: str) -> None:
    """Take candidates until it is interrupted; then what runs is stopped."""
    ensure(pool)
    remove_leftovers(root)
    worker = Worker(root, work_pool_name=pool, name=name, limit=limit)
    try:
        asyncio.run(worker.start(printer=lambda text: None))
    finally:  # or the server would call it online for a minute and a half
        with contextlib.suppress(UserError, ObjectNotFound):
            patiently(lambda client: forget(client, pool, name), seconds=5)


def remove_leftovers(root: Path) -> None:
    """Remove the workspaces of runs that have ended: of a machine that was switched off."""
    folders = list((root / FOLDER).iterdir()) if (root / FOLDER).is_dir() else []
    for folder in folders:
        with contextlib.suppress(ValueError):  # no name of a run
            found = patiently(partial(find, ids=[UUID(folder.name)]))
            if not any(run.state and not run.state.is_final() for run in found):
                remove(root, folder)
