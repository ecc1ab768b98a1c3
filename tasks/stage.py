"""The Prefect task that wraps one stage: its log, its progress, its time limit and its state."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from uuid import UUID

import httpx
from prefect import get_run_logger, runtime, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateDetails
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Completed, Failed

from stages import params
from stages.errors import UserError
from tasks import bridge
from tasks.command import parse_progress
from tasks.compute.task import Cluster
from tasks.pool.flight import Flight
from tasks.terminal import terminal

PROGRESS_SECONDS = 2  # between updates of a progress artifact: each is a call to the server


class Progress:
    """Shows a stage's progress on the terminal and, for long stages, as an artifact of the run."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.artifact: UUID | None = None
        self.updated = 0.0

    def update(self, done: int, total: int, note: str) -> None:
        terminal.progress(self.stage, done, total, note)
        now = time.monotonic()
        if self.stage.partition("@")[0] not in {"fetch", "quantize", "finetune", "publish"}:
            return
        if now - self.updated < PROGRESS_SECONDS and done < total:
            return
        self.updated = now
        percent = 100 * done / max(total, 1)
        # The stage goes on while the server is away.
        with contextlib.suppress(httpx.HTTPError, PrefectHTTPStatusError):
            self._show(percent, note)

    def _show(self, percent: float, note: str) -> None:
        if self.artifact is None:
            created = create_progress_artifact(percent, description=f"{self.stage}: {note}")
            self.artifact = created if isinstance(created, UUID) else None
        else:
            update_progress_artifact(self.artifact, percent, f"{self.stage}: {note}")


# DVC decides what is stale, so Prefect's own cache is off: a record of an earlier run says nothing
# about what is on disk. The state carries DVC's stage key as its cache key all the same.
@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False, log_prints=False)
def run_stage(
    name: str,
    root: Path,
    limit_seconds: float,
    azure: params.Azure | None = None,
    flight: Flight | None = None,
) -> State:
    """Bring one stage up to date.

    Args:
        name: the stage.
        root: the project's folder.
        limit_seconds: its command is killed after so long.
        azure: where its command is run; None for this machine.
        flight: of the flow run, when other machines may want the same stage.

    Returns:
        Cached when DVC skipped or restored it, Completed when it ran, Failed with its own last
        words as the message.
    """
    logger = get_run_logger()
    progress = Progress(name)
    terminal.started(name)

    def on_line(line: str) -> None:
        if step := parse_progress(line):
            progress.update(*step)
        elif line:
            if line.startswith("waits for "):  # the bridge's, or such a line of the stage's own
                terminal.note(f"{name} {line}")
            logger.info(line)

    env = {"OLIVEPRESS_RUN_ID": str(runtime.flow_run.id or "")}
    try:
        elsewhere = Cluster(root, name, azure, on_line, limit_seconds, env) if azure else None
        outcome = bridge.reproduce(
            root, name, on_line, limit_seconds, env, elsewhere=elsewhere, flight=flight
        )
    except (bridge.StageFailed, UserError) as error:
        return Failed(message=str(error))
    return Completed(
        name="Completed" if outcome.action == "run" else "Cached",
        message=describe(outcome),
        data=outcome,
        state_details=StateDetails(cache_key=outcome.key),
    )


def describe(outcome: bridge.Outcome) -> str:
    """Why the stage ran, or why it did not have to."""
    if outcome.action == "unchanged":
        return "nothing changed"
    reasons = "; ".join(outcome.reasons[:3]) + ("; …" if len(outcome.reasons) > 3 else "")
    if outcome.action == "run":
        return f"on {outcome.where}: {reasons}" if outcome.where else reasons
    return f"restored: {reasons}"
