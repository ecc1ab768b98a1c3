"""Which flow runs of this clone have lost their process.

Nobody else marks those: a process that was killed reports nothing, and Prefect's worker, if it
lives, marks the flow run of a process that it lost, but not its tasks.

Who makes a flow run holds a file in `.dvc/tmp/runs` locked until its process ends. The kernel gives
the lock back however that ends, so no process number is taken for another's, and no clock is read.
The file is there before the run is, and named by the run's idempotency key; a worker's run is there
before its process is, and its file is named by the run's id. The next flow of the clone asks the
server for the runs of the files that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from uuid import UUID, uuid4

import httpx
from prefect import Flow, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import FlowCreate, FlowRunCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.flow_engine import run_flow
from prefect.states import Pending, to_state_create

from stages.stage import end_with_parent
from tasks.pool import runs

FOLDER = Path(".dvc/tmp/runs")
NAME = "-".join("?" * count for count in (8, 4, 4, 4, 12))  # a UUID's: .DS_Store is none
LOST = "its process is gone, and did not say why: it was killed, or the machine was"

_held: dict[str, IO[str]] = {}  # until this process ends
_ours: set[UUID] = set()  # runs that a file of another name stands for


def run(root: Path, flow: Flow[..., Any], parameters: dict[str, Any]) -> State:
    """The final state of a flow that is run in this process."""
    key = str(uuid4())
    _hold(root, key)
    with get_client(sync_client=True) as client:
        made = _create(client, flow, parameters, key)
        _ours.add(made.id)
    return run_flow(flow, flow_run=made, parameters=parameters, return_type="state")  # type: ignore[return-value]


def _create(
    client: SyncPrefectClient, flow: Flow[..., Any], parameters: dict[str, Any], key: str
) -> FlowRun:
    """A flow run with this idempotency key, which the client's own method does not take."""
    named = FlowCreate(name=flow.name).model_dump(mode="json")
    new = FlowRunCreate(
        flow_id=client.request("POST", "/flows/", json=named).json()["id"],
        flow_version=flow.version,
        parameters=parameters,
        idempotency_key=key,
        state=to_state_create(Pending()),
    )
    sent = client.request(
        "POST", "/flow_runs/", json=new.model_dump(mode="json", exclude_unset=True)
    )
    return FlowRun.model_validate(sent.json())


def here(root: Path) -> None:
    """Begin a flow: show that its run is alive, and mark those that are not."""
    if runtime.deployment.id:  # or it would go on when its worker is killed, and nobody looks
        end_with_parent()
    own = UUID(str(runtime.flow_run.id))
    if own not in _ours:
        _hold(root, str(own))
    reap(root)


def _hold(root: Path, name: str) -> None:
    """Lock the file of this name for as long as this process lives."""
    path = root / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    while name not in _held:
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            _held[name] = file
        else:  # one who reaps had it first, and has removed it
            file.close()


def reap(root: Path) -> list[str]:
    """Mark the flow runs of this clone that have lost their process; their names.

    It does nothing while the server is away: the next one does.
    """
    names: list[str] = []
    try:
        with get_client(sync_client=True) as client:
            paths = [path for path in (root / FOLDER).glob(NAME) if path.name not in _held]
            for start in range(0, len(paths), runs.PAGE):
                with contextlib.ExitStack() as stack:
                    some = paths[start : start + runs.PAGE]
                    free = {it.name: it for it in some if stack.enter_context(_locked(it))}
                    names += _mark(client, free) if free else []
            return names + _never_begun(client, root)
    except (httpx.HTTPError, PrefectHTTPStatusError):
        return names


def _mark(client: SyncPrefectClient, free: dict[str, Path]) -> list[str]:
    """End the runs of these files; remove those whose run is known to have ended."""
    keys = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=list(free)))
    found = client.read_flow_runs(flow_run_filter=keys)
    found += runs.find(client, [UUID(name) for name in free])
    lost = [one for one in found if not runs.ended(one)]
    for one in lost:
        runs.crash(client, one.id, LOST)
    for one in found:
        runs.end_tasks(client, one.id)
        for name in (str(one.id), one.idempotency_key):
            if name in free:
                free[name].unlink(missing_ok=True)
    return [one.name for one in lost]


def _never_begun(client: SyncPrefectClient, root: Path) -> list[str]:
    """Mark runs whose worker was killed before their process came to its first line; their names.

    Only this clone's: others may share the server, and look after theirs themselves.


    Of a pool of processes: there a run is on its worker's machine, and does not outlive it. The
    server calls a worker offline after it was silent for a minute and a half.
    """
    pending = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING]))
    deployed = FlowRunFilterDeploymentId(is_null_=False)
    chosen = FlowRunFilter(state=pending, deployment_id=deployed)
    names = []
    for one in client.read_flow_runs(flow_run_filter=chosen, limit=runs.PAGE):
        pool = one.work_pool_name
        if not pool or client.read_work_pool(pool).type != "process":
            continue
        online = [
            worker.name
            for worker in client.read_workers_for_work_pool(pool)
            if worker.status == WorkerStatus.ONLINE
        ]
        worker = one.labels.get("prefect.worker.name")
        lost = worker not in online if worker else not online
        if lost and _is_of(client, root, one):
            runs.crash(client, one.id, "its worker is gone, and it had not begun")
            names.append(one.name)
    return names


def _is_of(client: SyncPrefectClient, root: Path, run: FlowRun) -> bool:
    """Whether a run was taken by this clone's worker, or its deployment names this folder."""
    if taken_by := run.labels.get(runs.CLONE):
        return taken_by == runs.clone(root)
    try:
        steps = client.read_deployment(run.deployment_id).pull_steps or []  # type: ignore[arg-type]
    except ObjectNotFound:
        return False
    named = [inputs.get("directory") for step in steps for inputs in step.values()]
    return any(folder and Path(folder).resolve() == root.resolve() for folder in named)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody holds a file; if so, nobody does until the end of the block."""
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(path.open("r+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except (BlockingIOError, FileNotFoundError):
            free = False
        yield free
