"""prefect.yaml with real commands: a worker, deploy, run with overrides, watch to the end."""

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
    deploy(toy, worker)
    said = sh(
        *("prefect", "deployment", "run", "optimize/local", "--watch"),
        *("-p", 'overrides={"quantize.bits": 8}'),
        cwd=toy,
        **worker,
    ).stdout
    assert "bits: 8" in (toy / "params.yaml").read_text()
    assert (toy / "out/each-travel").exists()
    assert states(task_runs(run_id(said))) == {"first": "Completed", "each@travel": "Completed"}
    again = sh("prefect", "deployment", "run", "optimize/local", "--watch", cwd=toy, **worker)
    assert set(states(task_runs(run_id(again.stdout))).values()) == {"Cached"}

    publish = sh(
        *("prefect", "deployment", "run", "optimize-and-publish/local", "--watch"),
        *("-p", "name=toy"),
        cwd=toy,
        check=False,
        **worker,
    )
    assert (
        message(publish.stdout)
        == "publish: models/package is not there yet; olivepress run makes it"
    )

    (toy / "first.py").write_text("import sys\nsys.exit('first: no such luck')\n")
    failed = sh(
        *("prefect", "deployment", "run", "optimize/local", "--watch"),
        cwd=toy,
        check=False,
        **worker,
    )
    assert failed.returncode == 1 and "finished in state 'Failed'" in failed.stdout
    assert message(failed.stdout) == "first: no such luck"


def deploy(toy: Path, env: dict[str, str]) -> None:
    """Deploy, once the worker has made its pool."""
    for _ in range(30):
        done = sh("prefect", "--no-prompt", "deploy", "--all", cwd=toy, check=False, **env)
        if done.returncode == 0 and "successfully" in done.stdout:
            return
    pytest.fail(f"{done.stdout}\n{done.stderr}")


def run_id(said: str) -> UUID:
    """The flow run's id, from what `prefect deployment run` prints."""
    lines = [line for line in said.splitlines() if "UUID:" in line]
    return UUID(lines[0].split("UUID:")[1].strip())


def message(said: str) -> str | None:
    """The last state's message of the run that `prefect deployment run` started."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id(said)).state
    return state.message if state else None
