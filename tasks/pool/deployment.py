"""The work pool of the candidates and their deployment, made when they are first needed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from tasks.pool.claims import patiently
from tasks.pool.machine import Has

POOL = "olivepress"
FLOW = "candidate"
# The module instead of a file in some folder: each worker has the project elsewhere.
ENTRYPOINT = "flows.candidate.candidate"


def template(kind: str) -> dict[str, Any]:
    """The base job template of a `process` or `kubernetes` work pool."""
    return json.loads((Path(__file__).parent / f"{kind}.json").read_text("utf-8"))


def ensure(pool: str = POOL) -> str:
    """Make the pool, of processes, and the deployment, unless they are there; its name."""
    return patiently(lambda client: _ensure(client, pool))


def _ensure(client: SyncPrefectClient, pool: str) -> str:
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        made = WorkPoolCreate(name=pool, type="process", base_job_template=template("process"))
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(made)
    name = "pool" if pool == POOL else f"pool-{pool}"
    client.create_deployment(
        flow_id=client.create_flow_from_name(FLOW),
        name=name,
        entrypoint=ENTRYPOINT,
        work_pool_name=pool,
        description="One candidate of a sweep, in a folder of its own",
        pull_steps=[],
    )
    return f"{FLOW}/{name}"


def ask(needs: Has) -> dict[str, Any]:
    """Job variables that say what a machine must have, as both templates name them."""
    return asdict(needs)


def asked(variables: dict[str, Any] | None) -> Has:
    """The same, read back from a flow run."""
    found = {key: (variables or {}).get(key) or 0 for key in ("gpus", "memory_gb", "disk_gb")}
    return Has(**found)


def workers(pool: str) -> list[str]:
    """The names of the pool's workers that answer."""
    found = patiently(lambda client: client.read_workers_for_work_pool(pool))
    return [worker.name for worker in found if worker.status == WorkerStatus.ONLINE]


def forget(client: SyncPrefectClient, pool: str, worker: str) -> None:
    """Take a worker that has ended off the pool's list."""
    names = {"work_pool_name": pool, "name": worker}
    client.request("DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params=names)
