"""The flow of one candidate of a sweep: a workspace, its parameters, its stages, its figures."""

from __future__ import annotations

import json
import os
import platform
import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Completed, Failed

from flows import summary
from flows.optimize import begin, run_stages
from stages.errors import UserError
from stages.measure import finite
from stages.stage import METRICS
from tasks import alive, bridge
from tasks.pool.claims import Claims, Pulse, Watch, patiently
from tasks.pool.flight import Flight
from tasks.pool.runs import abandon
from tasks.pool.workspace import remote_of, workspace
from tasks.sweep import figures
from tasks.sweep.figures import Limit
from tasks.terminal import terminal

RESULT = "candidate"  # the artifact that the sweep reads
OVER = "Over a limit"


@flow(name="candidate", log_prints=False, persist_result=False)
def candidate(
    commit: str,
    overrides: dict[str, Any],
    limits: list[str] | None = None,
    sweep: str | None = None,
) -> Any:
    """Bring every stage up to date for these parameters, in a folder of its own.

    Args:
        commit: of the project, 40 hex digits.
        overrides: values for params.yaml by dotted key.
        limits: conditions on figures; when one is broken no other stage is begun.
        sweep: flow run of the sweep; when that has lost its machine, nobody wants this any more.

    Returns:
        Completed with the figures as message; Completed as "Over a limit"; or Failed with the last
        words of the stage that failed.
    """
    run = str(runtime.flow_run.id)
    terminal.quiet = True
    try:
        root = bridge.find_root()
        alive.here(root)
        with (
            Pulse(run, on_lost=_end, and_look=partial(_look_after, sweep, Watch())),
            workspace(root, commit, run) as folder,
        ):
            os.chdir(folder)  # DVC reads it
            try:
                return _make(folder, run, overrides, [Limit.parse(text) for text in limits or []])
            finally:
                os.chdir(root)
    except UserError as error:
        return Failed(message=str(error))


def _end() -> None:
    """Another has declared this run dead, and what it makes is made elsewhere."""
    os.kill(os.getpid(), signal.SIGTERM)


def _look_after(sweep: str | None, watch: Watch, client: SyncPrefectClient) -> None:
    """End with the sweep, and with it what of it still waits."""
    if sweep and not watch.alive(client, sweep):
        abandon(client, UUID(sweep))
        _end()


def _make(folder: Path, run: str, overrides: dict[str, Any], limits: list[Limit]) -> Any:
    values, graph = begin(folder, overrides)
    adapters = list(values.adapters)
    done: set[str] = set()

    def go_on(row: summary.Row) -> bool:
        done.add(row.stage)
        return not figures.broken(limits, figures.read(folder, done, adapters))

    flight = Flight(folder, Claims(run, platform.node()), remote_of(folder))
    rows = run_stages(folder, values, hold_back(graph, limits), flight, go_on)
    known = figures.read(folder, done, adapters)
    failed = [row.reason for row in rows if not row.done]
    broken = figures.broken(limits, known, at_end=done == set(graph))
    flight.send(sorted(done))
    patiently(lambda _: leave(folder, rows, known, broken))
    patiently(lambda _: summary.publish(folder, rows))
    if failed:
        return Failed(message=failed[0])
    if broken:
        return Completed(name=OVER, message="; ".join(broken))
    return Completed(message="every stage is up to date")


def hold_back(graph: dict[str, set[str]], limits: list[Limit]) -> dict[str, set[str]]:
    """The graph in which finetune, which costs most, waits for what a limit may end before it."""
    groups = figures.need_first(limits)
    first = {stage for stage in graph if stage.partition("@")[0] in groups}
    return {
        stage: above | (first if stage.partition("@")[0] == "finetune" else set())
        for stage, above in graph.items()
    }


def leave(
    folder: Path,
    rows: list[summary.Row],
    known: dict[str, float | None],
    broken: list[str],
) -> None:
    """Leave as artifacts what the sweep needs: it shares nothing with this machine but a server."""
    shown = {name: value for name, value in known.items() if name in figures.FIGURES}
    create_table_artifact(
        [{"figure": name, "value": value} for name, value in finite(shown).items()],
        key="figures",
        description="What the limits and objectives of the sweep are on",
    )
    metrics = {
        path.relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in sorted((folder / METRICS).rglob("*.json"))
    }
    lock = folder / "dvc.lock"
    result = {
        "figures": finite(known),
        "broken": broken,
        "stages": [asdict(row) for row in rows],
        "machine": platform.node(),
        "params": (folder / "params.yaml").read_text("utf-8"),
        "lock": lock.read_text("utf-8") if lock.exists() else "",
        "metrics": metrics,
    }
    text = f"```json\n{json.dumps(result, indent=1)}\n```\n"
    create_markdown_artifact(text, key=RESULT, description="For the sweep that this is part of")
