"""One kill: a run is begun, something of it is killed, and one plain run must mend it all."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks import bridge
from tests.chaos import processes, project
from tests.chaos.clone import RUN_SECONDS, Clone

# How the run that is killed is begun, and what of it there is to kill.
DRIVERS = {
    "run": ("flow", "stage", "server", "all"),
    "repro": ("dvc", "stage", "all"),
    "worker": ("worker", "flow", "stage", "server", "all"),
}
WORKER_SECONDS = 95  # until the server calls a worker offline
ORPHAN_SECONDS = 8  # a stage looks for its parent twice a second
HOOK_SECONDS = 60  # it imports the flow to see that it has no hooks, and writes nothing


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
    if not one.wrong:
        worker_is_done(clone)
    one.wrong += state_of(clone)
    if one.wrong and all("is Submitting" in text or "is Pending" in text for text in one.wrong):
        time.sleep(WORKER_SECONDS)  # taken by a worker, and its process had not come to a line
        clone._command("olivepress", "ui")
        one.wrong = unfinished(clone)
    if one.wrong:  # the next kill begins with losing it
        shutil.copytree(clone.folder, f"{clone.folder}.wrong-{number}", symlinks=True)
    return one


def strike(clone: Clone, victim: str, deadline: float) -> list[processes.Process]:
    """Kill, once there is something of that kind to kill; what was killed."""
    while True:
        there = processes.of(clone.folder)
        chosen = [each for each in there if victim in (each.kind, "all")]
        working = [each for each in there if each.kind in ("client", "flow", "stage", "dvc")]
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
    began = time.monotonic()
    while left := [
        each
        for each in processes.of(clone.folder)
        if each.kind in ("stage", "dvc", "hook", "other")
        or (each.kind == "flow" and "deployment run" not in each.command)
    ]:
        waited = time.monotonic() - began
        late = [each for each in left if waited > ORPHAN_SECONDS and each.kind != "hook"]
        if waited > HOOK_SECONDS:
            late = left
        if late:
            one.wrong += [f"goes on: {each.command[-200:]}" for each in late]
            return
        time.sleep(0.2)


def worker_is_done(clone: Clone) -> None:
    """Wait for a worker's run that was not killed; it goes on beside the plain one."""
    deadline = time.monotonic() + RUN_SECONDS
    while "flow" in clone.kinds() and time.monotonic() < deadline:
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
    """Flow and task runs that the server has in no final state, though somebody had begun them.

    A flow run that is Scheduled, or Late, waits for a worker: that which was to take it was killed.
    """
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
        for one in flows
        if not (one.state and (one.state.is_final() or one.state.is_scheduled()))
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
