"""Claims, workspaces, GPUs and templates: what machines of a pool share and have for themselves."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessJobConfiguration

from conftest import init_project, sh
from flows.optimize import optimize
from lab import commit
from stages.errors import UserError
from tasks import bridge
from tasks.pool import claims, deployment, gpu
from tasks.pool.claims import Claims, Pulse, Watch, patiently
from tasks.pool.machine import Has
from tasks.pool.workspace import workspace


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulses so quick that a test sees one stop."""
    monkeypatch.setattr(claims, "PULSE_SECONDS", 0.2)
    monkeypatch.setattr(claims, "DEAD_SECONDS", 5.0)
    monkeypatch.setattr(claims, "WAIT_SECONDS", 0.2)


def variables() -> list[str]:
    with get_client(sync_client=True) as client:
        return [variable.name for variable in client.read_variables(limit=200)]


@pytest.mark.usefixtures("api", "quick")
def test_the_second_waits_for_the_first() -> None:
    key, order = uuid4().hex * 2, []
    first, second = str(uuid4()), str(uuid4())

    def other() -> None:
        with (
            Pulse(second),
            Claims(second, "b").held(key, lambda claim: order.append(f"waits for {claim.machine}")),
        ):
            order.append("second has it")

    with Pulse(first):
        with Claims(first, "a").held(key, print):
            thread = threading.Thread(target=copy_context().run, args=(other,))
            thread.start()
            time.sleep(7)  # more than a dead holder is given
            order.append("first is done")
        thread.join(30)
    assert order == ["waits for a", "first is done", "second has it"]
    left = [name for name in variables() if key in name or first in name or second in name]
    assert not left


@pytest.mark.usefixtures("api", "quick")
def test_of_two_who_find_a_dead_holder_one_gets_its_claim() -> None:
    key, held = uuid4().hex * 2, []
    dead = Claims(str(uuid4()), "lost")
    dead._take(key, print)  # and its machine is switched off

    def want(number: int) -> None:
        run = str(uuid4())
        with Pulse(run), Claims(run, f"m{number}").held(key, lambda claim: None):
            held.append(number)
            assert held.count(number) == 1
            time.sleep(0.5)
            held.append(number)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(copy_context().run, want, number) for number in range(4)]:
            done.result(timeout=60)
    pairs = list(zip(held[::2], held[1::2], strict=True))
    assert sorted(pairs) == [(number, number) for number in range(4)]  # never two at once


@pytest.mark.usefixtures("api", "quick")
def test_a_pulse_that_was_taken_away_tells_its_run() -> None:
    lost = threading.Event()
    run = str(uuid4())
    with Pulse(run, on_lost=lost.set):
        with get_client(sync_client=True) as client:
            Watch().forget(client, run)
        assert lost.wait(20)
    assert not [name for name in variables() if run in name]


@pytest.mark.usefixtures("api", "quick")
def test_time_without_a_server_is_not_held_against_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look stands for ten seconds at most, however long ago the one before was."""
    monkeypatch.setattr(claims, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(claims, "DEAD_SECONDS", 2.0)
    watch, run = Watch(), str(uuid4())
    with get_client(sync_client=True) as client:
        assert watch.alive(client, run)
        time.sleep(3)
        assert watch.alive(client, run)
        looks = []
        for _ in range(5):
            time.sleep(0.6)
            looks.append(watch.alive(client, run))
    assert looks[0] and not looks[-1]


def test_a_server_that_stays_away_is_one_line() -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}),
        pytest.raises(UserError, match="the Prefect server is away: "),
    ):
        patiently(lambda client: client.read_variables(), seconds=0.1)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = init_project(tmp_path / "project")
    (folder / "rows.jsonl").write_text("rows\n")
    (folder / ".dvc/config.local").write_text(
        "[core]\n    remote = store\n['remote \"store\"']\n    url = ../store\n"
    )
    (folder / ".dvc/config.local").chmod(0o600)
    sh("dvc", "add", "--quiet", "rows.jsonl", cwd=folder)
    commit(folder, "rows")
    return folder


def head(folder: Path) -> str:
    return sh("git", "rev-parse", "HEAD", cwd=folder).stdout.strip()


def test_a_workspace_shares_cache_remote_and_data(project: Path) -> None:
    with workspace(project, head(project), "one") as folder:
        assert (folder / "rows.jsonl").read_text() == "rows\n"
        settings, cache = bridge.settings(folder)
        assert cache == project / ".dvc/cache"
        assert settings["remote"]["store"]["url"] == str(project / "store")  # not the folder's own
        assert (folder / ".dvc/config.local").stat().st_mode & 0o777 == 0o600
        assert sh("git", "status", "--porcelain", cwd=project).stdout == ""
    assert not folder.exists()
    assert sh("git", "worktree", "list", cwd=project).stdout.count("\n") == 1


def test_a_workspace_goes_whatever_happens_in_it(project: Path) -> None:
    with pytest.raises(KeyError), workspace(project, head(project), "one") as folder:
        raise KeyError
    assert not folder.exists()


def test_a_commit_that_is_missing_is_fetched_or_named(project: Path, tmp_path: Path) -> None:
    sh("git", "clone", "--quiet", str(project), "clone", cwd=tmp_path)
    (project / "new").write_text("new")
    commit(project, "later")
    clone = tmp_path / "clone"
    sh("dvc", "cache", "dir", "--local", str(project / ".dvc/cache"), cwd=clone)
    with workspace(clone, head(project), "one") as folder:
        assert (folder / "new").exists()
    with (
        pytest.raises(UserError, match=r"has no commit 0{12}, and git fetch brings none"),
        workspace(clone, "0" * 40, "two"),
    ):
        pass


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (Has(0, 1, 1), []),
        (Has(1, 1, 1), ["a GPU"]),
        (Has(0, 32, 1), ["32.0 GB of memory (it has 16.0)"]),
        (Has(1, 1, 200), ["a GPU", "200.0 GB of free disk (it has 100.0)"]),
    ],
)
def test_what_a_machine_lacks(needs: Has, words: list[str]) -> None:
    assert Has(0, 16, 100).lacks(needs) == words
    assert deployment.asked(deployment.ask(needs)) == needs


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as /dev can tell."""
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (devices / name).touch()
    monkeypatch.setattr(gpu, "DEVICES", devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("0,1", 2), ("0,1,2", 2)]
)
def test_gpus_that_may_be_used(
    visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.count() == count


STAGES = """
stages:
  {0}:
    cmd: python span.py a
    deps: [span.py]
    outs: [a]
  {1}:
    cmd: python span.py b
    deps: [span.py]
    outs: [b]
  {2}:
    cmd: python span.py c
    deps: [span.py]
    outs: [c]
"""
SPAN = """
import sys, time
begun = time.time()
time.sleep(2)
open(sys.argv[1], "w").write(f"{begun} {time.time()}")
"""


@pytest.mark.usefixtures("api", "gpus")
def test_a_gpu_is_used_by_one_stage_while_others_go_on(toy: Path) -> None:
    (toy / "dvc.yaml").write_text(STAGES.format("quantize", "finetune", "export"))
    (toy / "span.py").write_text(SPAN)
    assert optimize({"run.concurrency": 3}, return_state=True).is_completed()
    spans = {name: [float(one) for one in (toy / name).read_text().split()] for name in "abc"}
    assert not overlap(spans["a"], spans["b"])
    assert overlap(spans["c"], spans["a"]) or overlap(spans["c"], spans["b"])


def overlap(one: list[float], other: list[float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def placeholders(value: object) -> set[str]:
    return set(re.findall(r"{{ (\w+) }}", str(value)))


@pytest.mark.parametrize("kind", ["process", "kubernetes"])
def test_templates_are_taken_by_the_server(kind: str, api: str) -> None:
    template = deployment.template(kind)
    variables = set(template["variables"]["properties"])
    assert placeholders(template["job_configuration"]) <= variables
    assert {"gpus", "memory_gb", "disk_gb"} <= variables
    made = WorkPoolCreate(name=f"lint-{uuid4()}", type=kind, base_job_template=template)
    with get_client(sync_client=True) as client:
        assert client.create_work_pool(made).base_job_template == template


def test_process_template_is_filled() -> None:
    found = asyncio.run(
        ProcessJobConfiguration.from_template_and_values(
            deployment.template("process"), deployment.ask(Has(1, 16.5, 40))
        )
    )
    assert found.command is None and found.working_dir is None


def test_kubernetes_template_is_filled() -> None:
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="the extra kubernetes is not")
    found = asyncio.run(
        worker.KubernetesWorkerJobConfiguration.from_template_and_values(
            deployment.template("kubernetes"),
            {**deployment.ask(Has(1, 16.5, 40)), "image": "press:1"},
        )
    )
    container = found.job_manifest["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "press:1" and container["workingDir"] == "/olivepress"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"]["memory"] == "16.5G"
    assert container["resources"]["requests"]["ephemeral-storage"] == "40G"
    assert container["envFrom"] == [{"secretRef": {"name": "olivepress", "optional": True}}]
