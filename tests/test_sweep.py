"""Sweeps over machines that share nothing but a Prefect server and a DVC remote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from azure.storage.blob import BlobServiceClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling
from sweeping import GRID, Machine, clone, machine, make, wait_until

from conftest import BIN, sh
from lab import content
from tasks import server
from tasks.pool import runs
from tests.emulator.azurite import Azurite


@dataclass
class World:
    """Machines, each with a clone, and what they share."""

    project: Path
    clones: list[Path]
    azurite: Azurite
    api: str

    def machine(self, number: int, **options: Any) -> Any:
        """A worker in a clone, for a `with` block."""
        return machine(self.clones[number], self.api, f"machine-{number}", **options)

    def begin(self, **changes: Any) -> subprocess.Popen[str]:
        """`olivepress sweep` as a process; `changes` are of the grid of 6."""
        spec = GRID | changes
        path = self.project.parent / f"{spec['name']}.yaml"
        path.write_text(yaml.safe_dump(spec))
        return subprocess.Popen(
            [BIN / "olivepress", "sweep", str(path), "--workers", "0", "--json"],
            cwd=self.project,
            env={**_environment(), "PREFECT_API_URL": self.api},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def sweep(self, **changes: Any) -> dict[str, Any]:
        """The same, to its end."""
        return self.end(self.begin(**changes))

    def end(self, process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
        said, errors = process.communicate(timeout=600)
        assert process.returncode == code, errors
        return json.loads(said)

    def ran(self) -> Counter[str]:
        """How often each stage was run, on all machines."""
        lines = [path.read_text() for path in self.project.parent.glob("machine-*.ran")]
        return Counter(line.split()[0] for text in lines for line in text.splitlines())


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}


def use_remote(folder: Path, azurite: Azurite, container: str) -> None:
    (folder / ".dvc/config.local").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n"
        f"    url = azure://{container}/dvc\n"
        f"    connection_string = {azurite.connection_string}\n"
    )


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with Azurite(tmp_path_factory.mktemp("azurite")) as started:
        yield started


@pytest.fixture
def world(tmp_path: Path, azurite: Azurite, api: str, request: pytest.FixtureRequest) -> World:
    """A project and three clones of it; with a remote of their own in every test."""
    return build(tmp_path, azurite, api)


def build(folder: Path, azurite: Azurite, api: str) -> World:
    container = f"c{time.time_ns()}"
    BlobServiceClient.from_connection_string(azurite.connection_string).create_container(container)
    project = make(folder / "project")
    clones = [clone(project, folder / f"clone{number}") for number in range(3)]
    for one in (project, *clones):
        use_remote(one, azurite, container)
    return World(project, clones, azurite, api)


def children(run: str) -> tuple[list[FlowRun], list[TaskRun]]:
    """The candidates' flow runs of a sweep, and the task runs in them and in the sweep."""
    with get_client(sync_client=True) as client:
        chosen = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run]))
        flows = client.read_flow_runs(flow_run_filter=chosen)
        ids = FlowRunFilterId(any_=[*(one.id for one in flows), run])
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=ids))
    return flows, tasks


def sweep_id(result: dict[str, Any]) -> str:
    return result["url"].rpartition("/")[2]


def assert_nothing_runs(run: str) -> None:
    """No flow run or task run of a sweep is in a state that is not final."""
    flows, tasks = children(run)
    open_ones = [(one.name, one.state_name) for one in (*flows, *tasks)
                 if not (one.state and one.state.is_final())]  # fmt: skip
    assert flows and not open_ones


@pytest.mark.long
def test_six_candidates_on_three_machines_are_as_six_runs(world: World, tmp_path: Path) -> None:
    """Same bytes, each stage computed once in the whole pool, and one command to adopt."""
    with ExitStack() as stack:
        for number in range(3):
            stack.enter_context(world.machine(number, sleep={"quantize": 2}))
        result = world.sweep()
    assert [one["state"] for one in result["candidates"]] == ["met"] * 6
    assert world.ran() == {
        "quantize": 2, "measure": 2, "export": 2, "finetune@travel": 6, "evaluate@travel": 6
    }  # fmt: skip
    assert result["executed"] == dict(world.ran())
    assert {one["machine"] for one in result["candidates"]} and result["best"] == 6
    assert_nothing_runs(sweep_id(result))

    alone, head = make(tmp_path / "alone"), result["commit"]
    here = {"PREFECT_API_URL": world.api}
    for one in result["candidates"]:
        sets = [f"-S{key}={value}" for key, value in one["overrides"].items()]
        sh("olivepress", "run", *sets, cwd=alone, **here)
        ref = f"refs/exps/{head[:2]}/{head[2:]}/{one['experiment']}:dvc.lock"
        made = yaml.safe_load(sh("git", "show", ref, cwd=world.project).stdout)
        assert made == yaml.safe_load((alone / "dvc.lock").read_text())

    listed = json.loads(sh("dvc", "exp", "show", "--json", cwd=world.project).stdout)
    names = {exp["name"] for rev in listed for exp in rev.get("experiments") or []}
    assert names == {f"grid-{number:03}" for number in range(1, 7)}

    said = sh("olivepress", "adopt", "grid", cwd=world.project).stdout
    assert "params.yaml: quantize.bits 4 → 8" in said and "olivepress pull" in said
    sh("olivepress", "pull", cwd=world.project)
    assert "Completed" not in sh("olivepress", "run", cwd=world.project, **here).stdout
    assert content(world.project / "models") == content(alone / "models")
    page = (world.project / "sweeps/grid/index.html").read_text()
    assert "candidate 6" in page and "<svg" in page
    assert (world.project / "sweeps/grid/pareto-size_mb-perplexity.png").exists()


@pytest.mark.long
def test_a_machine_that_is_switched_off_in_mid_stage(world: World) -> None:
    """Its candidate is made elsewhere, nothing stays Running, and no byte is wrong."""
    with world.machine(0, sleep={"finetune": 600}) as lost, ExitStack() as stack:
        process = world.begin(space={"quantize.bits": [4], "finetune.max_steps": [100, 200]})
        wait_until(lambda: "finetune@travel" in lost.stages)
        stack.enter_context(world.machine(1))
        lost.switch_off()
        result = world.end(process)
    assert [one["state"] for one in result["candidates"]] == ["met", "met"]
    assert sum(one["tries"] for one in result["candidates"]) == 3
    assert_nothing_runs(sweep_id(result))
    assert world.ran()["quantize"] == 1  # it was sent before the machine was lost


@pytest.mark.long
def test_the_remote_away_for_a_while(world: World) -> None:
    with world.machine(0, sleep={"quantize": 5}) as here:
        process = world.begin(space={"quantize.bits": [4, 8]})
        wait_until(lambda: "quantize" in here.stages)
        world.azurite.stop()
        time.sleep(30)
        world.azurite.__enter__()  # on the same port
        result = world.end(process)
    assert [one["state"] for one in result["candidates"]] == ["met", "met"]
    assert world.ran()["quantize"] == 2


@pytest.mark.long
def test_two_sweeps_at_once_share_what_they_make(world: World) -> None:
    with world.machine(0, sleep={"quantize": 3}), world.machine(1, sleep={"quantize": 3}):
        one = world.begin(name="one", space={"quantize.bits": [4], "finetune.max_steps": [100]})
        two = world.begin(name="two", space={"quantize.bits": [4], "finetune.max_steps": [200]})
        results = [world.end(one), world.end(two)]
    assert [r["candidates"][0]["state"] for r in results] == ["met", "met"]
    assert world.ran() == {
        "quantize": 1, "measure": 1, "export": 1, "finetune@travel": 2, "evaluate@travel": 2
    }  # fmt: skip


def test_ctrl_c_ends_the_candidates_and_their_processes(world: World) -> None:
    with world.machine(0, sleep={"finetune": 600}) as here:
        process = world.begin(space={"quantize.bits": [4, 8]})
        wait_until(lambda: "finetune@travel" in here.stages)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130 and "what was finished is kept" in said
        wait_until(lambda: not _stage_processes(here))
        kept = json.loads((world.project / "sweeps/grid/result.json").read_text())
        runs = [one["run"] for one in kept["candidates"]]
        assert {_state(run) for run in runs} == {"Cancelled"}
        assert here.process.poll() is None  # the worker serves on
    assert not (here.folder / ".dvc/tmp/candidates").exists() or not list(
        (here.folder / ".dvc/tmp/candidates").iterdir()
    )


def _stage_processes(here: Machine) -> list[int]:
    return [pid for pid in here.processes()
            if b"stage.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip


def _state(run: str) -> str | None:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run).state_name  # type: ignore[arg-type]


@pytest.mark.long
def test_a_sweep_cancelled_in_the_ui_ends_with_its_candidates(world: World) -> None:
    with world.machine(0, sleep={"finetune": 600}) as here:
        process = world.begin(space={"quantize.bits": [4, 8]})
        wait_until(lambda: "finetune@travel" in here.stages)
        run = own_run("grid")
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1 and "cancelled, and its candidates with it" in said
        wait_until(lambda: not _stage_processes(here))
        assert _state(str(run.id)) == "Cancelled"
        assert_nothing_runs(str(run.id))


@pytest.mark.long
def test_a_sweep_that_is_killed_takes_its_candidates_with_it(world: World) -> None:
    """They notice, end themselves, mark it Crashed and cancel what waited."""
    with world.machine(0, sleep={"finetune": 600}) as here:
        process = world.begin(space={"quantize.bits": [4, 8]})
        wait_until(lambda: "finetune@travel" in here.stages)
        run = own_run("grid")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        wait_until(lambda: _state(str(run.id)) == "Crashed")
        wait_until(lambda: not _stage_processes(here))
        flows, _ = children(str(run.id))
        wait_until(lambda: not any("ning" in str(_state(str(one.id))) for one in flows))
        assert "Cancelled" in {_state(str(one.id)) for one in flows}
        assert here.process.poll() is None


def own_run(name: str) -> FlowRun:
    """The flow run of the sweep that runs now."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["sweep"])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    assert found[0].parameters["given"]["name"] == name
    return found[0]


@pytest.mark.long
def test_the_server_restarted_in_the_middle(
    tmp_path: Path, azurite: Azurite, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "server"
    root.mkdir()
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(root / "no-profile"))
    api = server.ensure(root)
    port = api.rpartition(":")[2].partition("/")[0]
    try:
        world = build(tmp_path, azurite, api)
        with world.machine(0, sleep={"quantize": 8}) as here:
            process = world.begin(space={"quantize.bits": [4], "finetune.max_steps": [100, 200]})
            wait_until(lambda: "quantize" in here.stages)
            server.stop(root)
            time.sleep(5)
            monkeypatch.setattr(server, "FIRST_PORT", int(port))
            monkeypatch.delenv("PREFECT_API_URL", raising=False)
            assert server.ensure(root) == api
            result = world.end(process)
        assert [one["state"] for one in result["candidates"]] == ["met", "met"]
        assert world.ran()["quantize"] == 1
        with temporary_settings({PREFECT_API_URL: api}):
            assert_nothing_runs(sweep_id(result))
    finally:
        server.stop(root)


@pytest.mark.long
def test_a_machine_leaves_what_it_cannot_make(world: World) -> None:
    """Without a GPU it takes no candidate that needs one; another finishes beside it."""
    with world.machine(0) as here:
        process = world.begin(name="huge", needs={"gpu": True})
        result = world.sweep(space={"quantize.bits": [4]})
        assert result["candidates"][0]["state"] == "met"
        assert process.poll() is None and not (world.project / "sweeps/huge").exists()
        log = world.project.parent / "machine-0.log"
        wait_until(lambda: "huge-001 is left to others: it needs a GPU" in log.read_text())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert here.stages.count("quantize") == 1


def test_one_command_without_a_worker(tmp_path: Path, api: str) -> None:
    """It starts one for as long as it lasts; a candidate over a limit is not finetuned."""
    project = make(tmp_path / "project")
    limits = ["size_mb <= 0.006", "perplexity_ratio <= 1.03"]
    spec = GRID | {"space": {"quantize.bits": [4, 8]}, "limits": limits}
    (project / "sweep.yaml").write_text(yaml.safe_dump(spec))
    ran = tmp_path / "ran"
    said = sh("olivepress", "sweep", cwd=project, PREFECT_API_URL=api, RAN=str(ran)).stdout
    assert "1 worker started here" in said and "best is candidate 1" in said
    assert "olivepress adopt grid" in said
    found = json.loads((project / "sweeps/grid/result.json").read_text())["candidates"]
    assert [one["state"] for one in found] == ["met", "over a limit"]
    assert found[1]["message"] == "size_mb is 0.009, wanted ≤ 0.006"
    stages = Counter(line.split()[0] for line in ran.read_text().splitlines())
    assert stages["quantize"] == 2 and stages["finetune@travel"] == 1
    with get_client(sync_client=True) as client:
        taken_by = [one.labels.get(runs.CLONE) for one in client.read_flow_runs(limit=200)]
    assert taken_by.count(runs.clone(project)) == 2
