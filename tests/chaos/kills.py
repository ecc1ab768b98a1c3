"""One kill: a run is begun, something of it is killed, and one plain run must mend it all."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from conftest import BIN, REPO, sh
from tasks import bridge
from tests.chaos import processes, project
from tests.chaos.processes import MARK

# How the run that is killed is begun, and what of it there is to kill.
DRIVERS = {
    "run": ("flow", "stage", "server", "all"),
    "repro": ("dvc", "stage", "all"),
    "worker": ("worker", "flow", "stage", "server", "all"),
}
ORPHAN_SECONDS = 8  # a stage looks for its parent twice a second
RUN_SECONDS = 280


@dataclass
class Kill:
    """What was killed, and what came of it."""

    number: int
    driver: str
    victim: str
    after: float
    """Seconds from the beginning of the run."""
    found: list[str] = field(default_factory=list)
    """What was running: kinds of process, and stages."""
    mended: float = 0
    """Seconds of the plain run afterwards."""
    wrong: list[str] = field(default_factory=list)
    """What should not be, in words; nothing if all is well."""


class Clone:
    """A clone in which runs are killed.

    Args:
        folder: where it is made, unless it is there.
        kind: `quick` or `real`.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.env = {
            **{name: it for name, it in os.environ.items() if not name.startswith("PREFECT_")},
            **{MARK: str(folder), "PYTHONPATH": str(REPO), "PREFECT_WORKER_QUERY_SECONDS": "1"},
            **{"PATH": f"{BIN}:{os.environ['PATH']}"},
        }
        kept = Path(f"{folder}.json")
        if not kept.exists():
            project.make(folder, kind)
            self._must_run()
            reference = project.made(folder)
            shutil.copy(folder / "dvc.lock", f"{folder}.lock")
            self._lose()
            began = time.monotonic()
            self._must_run()  # with a server, and from scratch: so long there is something to kill
            seconds = time.monotonic() - began
            assert project.made(folder) == reference
            kept.write_text(json.dumps({"seconds": seconds, "made": reference}))
        reference = json.loads(kept.read_text())
        self.made: dict[str, str] = reference["made"]
        self.seconds: float = reference["seconds"]

    def _must_run(self) -> None:
        done = self.run()
        assert done.returncode == 0, done.stdout + done.stderr

    def _lose(self) -> None:
        """Lose every output and all of DVC's cache."""
        for name in (*project.FOLDERS, ".dvc/cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "dvc.lock").unlink(missing_ok=True)

    def run(self) -> subprocess.CompletedProcess[str]:
        """One plain `olivepress run`, as a person types it."""
        return subprocess.run(
            ["olivepress", "run"],
            cwd=self.folder, env=self.env, capture_output=True, text=True, check=False,
            timeout=RUN_SECONDS,
        )  # fmt: skip

    def begin(self, driver: str) -> subprocess.Popen:
        """Begin the run that is to be killed."""
        command = {
            "run": ["olivepress", "run"],
            "repro": ["dvc", "repro"],
            "worker": ["prefect", "deployment", "run", "optimize/local", "--watch"],
        }[driver]
        return self._start(command, driver)

    def _start(self, command: list[str], name: str) -> subprocess.Popen:
        with Path(f"{self.folder}.{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def ready(self, driver: str) -> None:
        """Have a server, and for a worker's run the worker and the deployment."""
        if driver == "repro":
            return
        if "server" not in self.kinds():
            self._command("olivepress", "ui")
        if driver != "worker" or "worker" in self.kinds():
            return
        self._start(
            ["prefect", "worker", "start", "--pool", "local-pool", "--type", "process"], "worker"
        )
        for _ in range(30):
            done = self._command("prefect", "--no-prompt", "deploy", "--all")
            if "successfully" in done.stdout:
                return
        raise AssertionError(done.stdout + done.stderr)

    def _command(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False
        )

    def forget(self, dice: random.Random) -> None:
        """Be a clone that has yet to make its outputs, or one that only has to restore them."""
        if dice.random() < 0.7:
            return self._lose()
        for name in project.FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.copy(f"{self.folder}.lock", self.folder / "dvc.lock")

    def kinds(self) -> set[str]:
        return {one.kind for one in processes.of(self.folder)}

    def close(self) -> None:
        for one in processes.of(self.folder):
            one.kill()


def kill(
    clone: Clone, seed: int, number: int, which: tuple[str, str] | None = None, within: float = 1.0
) -> Kill:
    """Begin a run, kill something of it at a random moment, and say what a plain run finds.

    Args:
        clone: where.
        seed, number: of the dice.
        which: how the run is begun and what is killed; None leaves it to the dice.
        within: this part of a run's time.
    """
    dice = random.Random(f"{seed}-{number}")
    driver = dice.choice(list(DRIVERS))
    victim = dice.choice(DRIVERS[driver])
    driver, victim = which or (driver, victim)
    one = Kill(number, driver, victim, 0)
    clone.forget(dice)
    clone.ready(driver)
    begun = time.monotonic()
    run = clone.begin(driver)
    slower = 1.5 if driver == "worker" else 1.0  # a process is begun for it
    moment = begun + dice.uniform(0, clone.seconds * slower * within)
    while time.monotonic() < moment:
        time.sleep(0.02)
    killed = strike(clone, victim, begun + 2 * clone.seconds)
    one.after = round(time.monotonic() - begun, 2)
    one.found = sorted({each.kind + stage_of(each.command) for each in killed})
    orphans(clone, one)
    run.kill()
    run.wait()
    began = time.monotonic()
    try:
        done = clone.run()
        if done.returncode:
            one.wrong.append(f"the plain run: {(done.stderr or done.stdout).strip()[-600:]}")
    except subprocess.TimeoutExpired as error:
        one.wrong.append(f"the plain run has no end: {(error.stdout or b'')[-300:]!r}")
    one.mended = round(time.monotonic() - began, 1)
    one.wrong += state_of(clone)
    return one


def strike(clone: Clone, victim: str, deadline: float) -> list[processes.Process]:
    """Kill, once there is something of that kind to kill; what was killed."""
    while True:
        there = processes.of(clone.folder)
        chosen = [each for each in there if victim in (each.kind, "all")]
        working = [each for each in there if each.kind in ("flow", "stage", "dvc")]
        if chosen or not working or time.monotonic() > deadline:
            for each in chosen:
                each.kill()
            return chosen
        time.sleep(0.005)


def stage_of(command: str) -> str:
    words = command.split()
    for at, word in enumerate(words):
        if word.endswith("stage.py") or word.startswith("stages."):
            return f" {(words[at + 1] if word.endswith('stage.py') else word[7:])}"
    return ""


def orphans(clone: Clone, one: Kill) -> None:
    """Whoever works on without the one that was to look after it must end by itself."""
    if one.victim not in ("flow", "dvc", "worker", "all"):
        return
    deadline = time.monotonic() + ORPHAN_SECONDS
    while left := [
        each
        for each in processes.of(clone.folder)
        if each.kind in ("stage", "dvc")
        or (each.kind == "flow" and "deployment run" not in each.command)
        or each.kind == "other"
    ]:
        if time.monotonic() > deadline:
            one.wrong += [f"goes on: {each.command[:120]}" for each in left]
            return
        time.sleep(0.2)


def state_of(clone: Clone) -> list[str]:
    """What is wrong with a clone in which a plain run has just ended well."""
    wrong = [f"damaged in the cache: {path}" for path in project.damaged(clone.folder)]
    now = project.made(clone.folder)
    wrong += [
        f"differs: {path}" for path in sorted(now.keys() | clone.made)
        if now.get(path) != clone.made.get(path)
    ]  # fmt: skip
    with contextlib.chdir(clone.folder):
        needs = bridge.status(clone.folder)
    wrong += [f"stale: {name}: {it.reasons}" for name, it in needs.items() if it.reasons]
    wrong += [f"left: {path}" for path in clone.folder.rglob(".*.tmp-*")]
    return wrong + unfinished(clone)


def unfinished(clone: Clone) -> list[str]:
    """Flow and task runs that the server has in no final state."""
    text = (clone.folder / "prefect.toml").read_text()
    url = next(line.split('"')[1] for line in text.splitlines() if line.startswith("url"))
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        flows = client.read_flow_runs(limit=200, sort="EXPECTED_START_TIME_DESC")
        open_ = {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]}
        body: dict[str, Any] = {"task_runs": {"state": {"type": open_}}, "limit": 200}
        tasks = client.request("POST", "/task_runs/filter", json=body).json()
    names = {one.id: one.name for one in flows}
    return [
        f"flow run {one.name} is {one.state_name}: {one.state.message if one.state else ''}"
        for one in flows if not (one.state and one.state.is_final())
    ] + [
        f"task run {one['name']} of {names.get(UUID(one['flow_run_id']))} is {one['state_name']}"
        for one in tasks
    ]  # fmt: skip


def line(one: Kill) -> str:
    """The kill as a row of a table."""
    verdict = "; ".join(one.wrong) or "as if undisturbed"
    return (
        f"| {one.number} | {one.driver} | {one.victim} | {one.after:.1f} "
        f"| {', '.join(one.found) or 'nothing left to kill'} | {one.mended:.1f} | {verdict} |"
    )


def as_json(one: Kill) -> str:
    return json.dumps(asdict(one))


__all__ = ["DRIVERS", "Clone", "Kill", "as_json", "kill", "line", "sh"]
