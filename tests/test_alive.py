"""Runs whose process was killed are marked by the next run of the clone, and no other run is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_HOME
from prefect.states import Pending
from sweeping import wait_until
from test_scarcity import SLOW, in_background

from conftest import REPO, typed
from flows.optimize import optimize
from tasks import alive, server
from tasks.pool import deployment, runs
from tasks.turn import turn

STEP = "prefect.deployments.steps.set_working_directory"

pytestmark = pytest.mark.usefixtures("api")


def latest() -> UUID:
    """The flow run that was begun last."""
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort="START_TIME_DESC", limit=1)[0].id


def states(run: UUID) -> tuple[str | None, str | None, list[str | None]]:
    """State and message of a flow run, and the states of its tasks."""
    with get_client(sync_client=True) as client:
        one = client.read_flow_run(run)
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        tasks = client.read_task_runs(flow_run_filter=chosen)
    assert one.state is not None
    return one.state.name, one.state.message, [task.state_name for task in tasks]


def test_a_run_that_was_killed_is_marked_by_the_next_with_its_tasks(toy: Path, api: str) -> None:
    (toy / "first.py").write_text(SLOW)
    with in_background("olivepress", "run", cwd=toy, PREFECT_API_URL=api) as process:
        wait_until((toy / "runs").exists)
        run = latest()
        wait_until(lambda: states(run)[2] == ["Running"])
        assert alive.reap(toy) == []  # it lives
        process.kill()
        process.wait()
    assert states(run)[0] == "Running"
    (toy / "go").touch()
    assert typed("run", cwd=toy, PREFECT_API_URL=api).exit_code == 0
    assert states(run) == ("Crashed", alive.LOST, ["Crashed"])


# As `alive.run`, and then the kill that comes at the worst moment: the server has the run, and no
# line of the flow was run.
CREATED = """
import os, sys
from pathlib import Path
from prefect import flow
from prefect.client.orchestration import get_client
from flows.optimize import optimize
from tasks import alive, server
from tasks.pool import deployment

@flow
def some():
    pass

alive._hold(Path.cwd(), "{key}")
with get_client(sync_client=True) as client:
    print(alive._create(client, some, {{}}, "{key}").id, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_run_that_was_killed_before_its_first_line_is_marked(toy: Path, api: str) -> None:
    key = "3b241101-e2bb-4255-8caf-4136c566a962"
    done = subprocess.run(
        [sys.executable, "-c", CREATED.format(key=key)],
        cwd=toy, env=env(api), capture_output=True, text=True, check=False,
    )  # fmt: skip
    run = UUID(done.stdout.strip())
    assert states(run)[0] == "Pending" and (toy / alive.FOLDER / key).exists()
    assert len(alive.reap(toy)) == 1
    assert states(run)[0] == "Crashed" and not (toy / alive.FOLDER / key).exists()


def env(api: str) -> dict[str, str]:
    return {**os.environ, "PREFECT_API_URL": api, "PYTHONPATH": str(REPO)}


def test_what_the_server_does_not_know_of_is_asked_for_again(toy: Path) -> None:
    """It may be another server's: which one a clone uses is set in its environment."""
    path = toy / alive.FOLDER / "9f4a1fd2-21c4-4a1c-9d73-1b2f6a0d1f11"
    path.parent.mkdir(parents=True)
    path.touch()
    assert alive.reap(toy) == [] and path.exists()


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000000234a5b600000001", "notes.txt"])
def test_a_file_that_stands_for_no_run_is_left_alone(toy: Path, name: str) -> None:
    path = toy / alive.FOLDER / name
    path.parent.mkdir(parents=True)
    path.touch()
    assert alive.reap(toy) == [] and path.exists()


def test_the_file_of_a_run_that_ended_is_removed(toy: Path, api: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "olivepress", "run"],
        cwd=toy, env=env(api), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and len(list((toy / alive.FOLDER).iterdir())) == 1
    assert alive.reap(toy) == [] and not list((toy / alive.FOLDER).iterdir())


def test_a_run_that_a_worker_took_and_did_not_begin(toy: Path) -> None:
    """It stays while the server calls its worker online, and those of other clones stay too."""
    pool = f"taken-{uuid4()}"
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        flow = client.create_flow(optimize)

        def taken(worker: str, folder: Path | None = None, **labels: str) -> FlowRun:
            """A run of a deployment in a folder, or of one on any worker, which labels it."""
            steps = [{STEP: {"directory": str(folder)}}] if folder else []
            made = client.create_deployment(
                flow, str(uuid4()), work_pool_name=pool, pull_steps=steps
            )
            client.send_worker_heartbeat(pool, worker, heartbeat_interval_seconds=2)
            one = client.create_flow_run_from_deployment(made, state=Pending(name="Submitting"))
            client.update_flow_run_labels(one.id, {"prefect.worker.name": worker, **labels})
            return one

        ours, theirs = (runs.clone(folder) for folder in (toy, toy / "other"))
        lost = [taken("killed", toy), taken("killed", **{runs.CLONE: ours})]
        kept = [
            taken("lives", toy),
            taken("killed", toy / "other"),
            taken("killed", **{runs.CLONE: theirs}),
            taken("killed"),
        ]
        assert alive.reap(toy) == []
        wait_until(lambda: "killed" not in online(pool, "lives"))
        assert sorted(alive.reap(toy)) == sorted(one.name for one in lost)
        assert {states(one.id)[0] for one in lost} == {"Crashed"}
        assert {states(one.id)[0] for one in kept} == {"Submitting"}
        for one in kept:
            client.delete_flow_run(one.id)


def online(pool: str, beats: str) -> list[str]:
    """The workers that answer, after one of them has."""
    with get_client(sync_client=True) as client:
        client.send_worker_heartbeat(pool, beats, heartbeat_interval_seconds=2)
    return deployment.workers(pool)


# Not yet at its first line that looks for its parent, as while it imports its libraries.
IMPORTING = """
import os, time
from pathlib import Path
Path("importing").write_text(str(os.getpid()))
time.sleep(1)
from stages.stage import die_with_parent, new_output
die_with_parent()
Path("at_work").touch()
with new_output(Path("out/first")) as out:
    out.write_text("late")
"""


@pytest.mark.parametrize("shell", [False, True], ids=["directly", "through a shell"])
@pytest.mark.parametrize("command", ["olivepress run", "dvc repro first"])
def test_a_stage_that_imports_does_not_outlive_who_started_it(
    toy: Path, api: str, command: str, shell: bool
) -> None:
    (toy / "first.py").write_text(IMPORTING)
    if shell:
        text = (toy / "dvc.yaml").read_text()
        (toy / "dvc.yaml").write_text(text.replace("python first.py", "python first.py; true"))
    here, importing = {"PREFECT_API_URL": api, "PYTHONPATH": str(REPO)}, toy / "importing"
    with in_background(*command.split(), cwd=toy, **here) as process:
        wait_until(lambda: importing.exists() and importing.read_text())
        process.kill()
    wait_until(lambda: not lives(int(importing.read_text())))
    assert not (toy / "at_work").exists() and not (toy / "out/first").exists()


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_server_of_another_clone_is_not_taken_for_ours(toy: Path, api: str) -> None:
    """It has the port that ours had, and ours was killed; the number of ours is another's, too."""
    other = subprocess.Popen(["sleep", "600"])
    try:
        (toy / "prefect.toml").write_text(f'[api]\nurl = "{api}"\n')
        (toy / ".prefect").mkdir()
        (toy / ".prefect/server.pid").write_text(str(other.pid))
        assert not server.is_own(toy, api)
        assert server.stop(toy) and other.poll() is None
        assert server.is_own(Path(str(PREFECT_HOME.value())).parent, api)
    finally:
        other.kill()
        other.wait()


def test_a_turn_is_given_back_by_a_kill(toy: Path) -> None:
    code = (
        "from pathlib import Path; from tasks.turn import turn; import time\n"
        "with turn(Path.cwd(), print): print('mine', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=toy, env=env(""), stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "mine\n"
    said: list[str] = []
    other.kill()
    other.wait()
    began = time.monotonic()
    with turn(toy, said.append):
        assert said == [] and time.monotonic() - began < 5
