"""prefect.yaml with real commands: a worker, deploy, run with overrides, watch, schedules."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import DeploymentSchedule, State
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.deployments import run_deployment
from sweeping import wait_until
from test_flow import states, task_runs

from conftest import BIN, REPO, hears_ctrl_c, sh


@pytest.fixture
def worker(toy: Path, api: str) -> Iterator[dict[str, str]]:
    """A process worker, started as the README says; yields the environment it shares."""
    home = Path(os.environ["PREFECT_HOME"])
    env = {"PREFECT_API_URL": api, "PREFECT_HOME": str(home), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    process = subprocess.Popen(
        [BIN / "prefect", "worker", "start", "--pool", "local-pool", "--type", "process"],
        cwd=toy,
        env={**os.environ, **env, "PATH": f"{BIN}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509
    )
    yield env
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def test_deployment_run_from_a_clone(toy: Path, worker: dict[str, str], api: str) -> None:
    shutil.copy(REPO / "prefect.yaml", toy)
    shutil.copytree(REPO / "flows", toy / "flows")
    wait_until(has_pool)  # the worker makes it
    sh("prefect", "--no-prompt", "deploy", "--all", cwd=toy, **worker)
    night, poll = schedule("optimize/nightly"), schedule("refresh/local")
    assert isinstance(night.schedule, CronSchedule) and night.schedule.cron == "0 2 * * *"
    assert isinstance(poll.schedule, IntervalSchedule) and poll.schedule.interval.seconds == 300
    assert not night.active and not poll.active

    said = sh(
        *("prefect", "deployment", "run", "optimize/local", "--watch"),
        *("-p", 'overrides={"quantize.bits": 8}'),
        cwd=toy,
        **worker,
    ).stdout
    assert "bits: 8" in (toy / "params.yaml").read_text()
    assert (toy / "out/each-travel").exists()
    assert states(task_runs(run_id(said))) == {"first": "Completed", "each@travel": "Completed"}

    publish = end_of("optimize-and-publish/local", name="toy")
    assert publish.is_failed()
    assert publish.message == "publish: models/package is not there yet; olivepress run makes it"

    (toy / "first.py").write_text("import sys\nsys.exit('first: no such luck')\n")
    failed = end_of("optimize/local")
    assert failed.is_failed() and failed.message == "first: no such luck"

    resume = ("prefect", "deployment", "schedule", "resume", "refresh/local")
    sh(*resume, str(poll.id), cwd=toy, **worker)
    assert schedule("refresh/local").active
    with get_client(sync_client=True) as client:
        client.delete_deployment(client.read_deployment_by_name("refresh/local").id)


def has_pool() -> bool:
    with get_client(sync_client=True) as client:
        return "local-pool" in [pool.name for pool in client.read_work_pools()]


def schedule(deployment: str) -> DeploymentSchedule:
    """The one schedule of a deployment."""
    with get_client(sync_client=True) as client:
        (found,) = client.read_deployment_by_name(deployment).schedules
    return found


def run_id(said: str) -> UUID:
    """The flow run's id, from what `prefect deployment run` prints."""
    lines = [line for line in said.splitlines() if "UUID:" in line]
    return UUID(lines[0].split("UUID:")[1].strip())


def end_of(deployment: str, **parameters: str) -> State:
    """The final state of a run of it."""
    run = run_deployment(
        deployment, parameters=parameters, timeout=120, poll_interval=0.5, as_subflow=False
    )
    assert run.state
    return run.state
