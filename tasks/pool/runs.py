"""Flow runs of a sweep on the server: found, cancelled, and marked when nobody else does."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import ArtifactSort
from prefect.states import Cancelled, Cancelling, Crashed, State

PAGE = 200  # that the server gives at a time
CLONE = "olivepress.clone"  # label of a flow run: the clone whose worker took it


def clone(root: Path) -> str:
    """What tells clones apart on a server that machines share."""
    return f"{platform.node()}:{root}"


def find(client: SyncPrefectClient, ids: Sequence[UUID]) -> list[FlowRun]:
    """Flow runs by id; those that were deleted are not there."""
    found: list[FlowRun] = []
    for start in range(0, len(ids), PAGE):
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + PAGE])))
        found += client.read_flow_runs(flow_run_filter=chosen, limit=PAGE)
    return found


def children(client: SyncPrefectClient, run: UUID) -> list[FlowRun]:
    """The flow runs that a run has begun."""
    chosen = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]))
    found: list[FlowRun] = []
    while some := client.read_flow_runs(flow_run_filter=chosen, limit=PAGE, offset=len(found)):
        found += some
    return found


def ended(run: FlowRun) -> bool:
    return bool(run.state and run.state.is_final())


def cancel_children(client: SyncPrefectClient, run: UUID) -> None:
    """Cancel what a run has begun: workers end the processes of a run that is Cancelling."""
    for child in children(client, run):
        if child.state and not ended(child):
            begun = child.state.is_running() or child.state.is_pending()
            to: State = Cancelling() if begun else Cancelled()
            client.set_flow_run_state(child.id, to)


def crash(client: SyncPrefectClient, run: UUID, message: str) -> None:
    """Mark a flow run as Crashed, whatever its process thinks."""
    client.set_flow_run_state(run, Crashed(message=message), force=True)


def end_tasks(client: SyncPrefectClient, run: UUID) -> None:
    """Mark the tasks that a run, which was lost or stopped, left running: nobody else does."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    for task in client.read_task_runs(flow_run_filter=chosen):
        if task.state and not task.state.is_final():
            client.set_task_run_state(task.id, Crashed(message="its run has ended"), force=True)


def abandon(client: SyncPrefectClient, run: UUID) -> None:
    """Mark a run that has lost its machine, and cancel what it has begun."""
    found = find(client, [run])
    if found and not ended(found[0]):
        crash(client, run, "its machine was lost")
    cancel_children(client, run)


def sent_by(client: SyncPrefectClient, run: UUID, key: str) -> dict[str, Any]:
    """The JSON that a run left as a markdown artifact; nothing if it did not come that far."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=[key])
        ),
        sort=ArtifactSort.CREATED_DESC,
    )
    if not found:
        return {}
    return json.loads(str(found[0].data).removeprefix("```json\n").rpartition("```")[0])
