"""The flow: every stage of dvc.yaml in order, as many at once as params.yaml allows."""

from __future__ import annotations

import difflib
import queue
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Failed

from flows import summary
from stages import params
from stages.errors import UserError, lack
from tasks import alive, bridge, doctor, store
from tasks import overrides as changes
from tasks.command import stages_end_with_caller
from tasks.git import branch
from tasks.pool import gpu
from tasks.pool.flight import Flight
from tasks.stage import run_stage
from tasks.terminal import terminal
from tasks.turn import turn


@flow(name="optimize", log_prints=False, persist_result=False)
def optimize(overrides: dict[str, Any] | None = None) -> Any:
    """Bring every stage up to date, and say what was done and why.

    Args:
        overrides: values for params.yaml by dotted key, for instance {"quantize.bits": 8}.

    Returns:
        A row for each stage; or a Failed state with the last words of the stage that failed, or
        with what is wrong in params.yaml, dvc.yaml or the machine.
    """
    try:
        root = bridge.find_root()
        alive.here(root)
        with turn(root, _waits):
            return _optimize(root, overrides or {})
    except UserError as error:
        return Failed(message=str(error))
    except OSError as error:
        if said := lack(error):
            return Failed(message=said)
        raise


def _waits(who: str) -> None:
    get_run_logger().info("waits for %s", who)
    terminal.note(f"waits for {who}")


def _optimize(root: Path, overrides: dict[str, Any]) -> Any:
    values, graph = begin(root, overrides)
    found = _checked_out(root)
    rows = run_stages(root, values, graph)
    summary.publish(root, rows)
    if any(row.state != "Cached" for row in rows):
        report(root)
    failed = [row.reason for row in rows if not row.done]
    if not failed and _checked_out(root) != found:
        failed = _changed(root)
    return Failed(message=failed[0], data=rows) if failed else rows


def _checked_out(root: Path) -> list[Any]:
    """What changes when another branch is checked out, or params.yaml is edited."""
    return [branch(root), *(store.stamp(root / name) for name in ("dvc.yaml", "params.yaml"))]


def _changed(root: Path) -> list[str]:
    """What of a run that ended well is stale by now, because another branch was checked out."""
    return [
        f"{name}: {'; '.join(need.reasons[:3])}, while this ran: run it again for what is there now"
        for name, need in bridge.status(root).items()
        if need.action != "unchanged"
    ]


def begin(root: Path, overrides: dict[str, Any]) -> tuple[params.Params, dict[str, set[str]]]:
    """The parameters, changed and checked, and the stages with what each directly depends on.

    Raises:
        UserError: what is wrong in params.yaml, dvc.yaml or the machine.
    """
    for change in changes.apply(root, overrides):
        get_run_logger().info("params.yaml: %s", change)
    values = params.load(root / "params.yaml")
    doctor.check_or_raise(root)
    graph, removed = bridge.begin(root)
    for path in removed:
        get_run_logger().info("removed %s, which an earlier run left", path)
    check_names("run.time_limits", values.run.time_limits, graph)
    groups = {stage.partition("@")[0] for stage in graph}
    check_names("compute", values.compute, {*graph, *groups})
    gpu.announce()
    return values, graph


def run_stages(
    root: Path,
    values: params.Params,
    graph: dict[str, set[str]],
    flight: Flight | None = None,
    go_on: Callable[[summary.Row], bool] = lambda row: True,
) -> list[summary.Row]:
    """Bring the stages up to date, in order; a row for each that was begun.

    Args:
        root: the project's folder.
        values: its parameters.
        graph: stages with what each waits for.
        flight: of the flow run, when other machines may want the same stages.
        go_on: asked after each stage that ended well whether to begin others.
    """
    settings = values.run
    one = run_stage.with_options(retries=settings.retries)

    def start(stage: str, upstream: list[PrefectFuture]) -> PrefectFuture:
        limit = settings.time_limits.get(stage, settings.time_limit_minutes) * 60
        azure = values.azure if values.machine(stage) == "azureml" else None
        return one.submit(stage, root, limit, azure, flight, wait_for=upstream)  # type: ignore[call-overload]

    rows: list[summary.Row] = []

    def ended(stage: str, state: State, seconds: float) -> bool:
        rows.append(summary.row(stage, state, seconds))
        terminal.ended(rows[-1].stage, rows[-1].state, rows[-1].reason, seconds)
        return rows[-1].done and go_on(rows[-1])

    with stages_end_with_caller():
        in_order(graph, settings.concurrency, start, ended)
    return rows


def report(root: Path) -> None:
    """Write the report if there are figures; the work of a run is not lost to a picture."""
    try:
        if summary.metrics(root):
            summary.publish_report(root)
    except Exception as error:
        get_run_logger().warning("no report was written: %s", error, exc_info=True)


def check_names(section: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise a UserError for a name in params.yaml that is no stage, with the nearest one."""
    for name in given:
        if name not in known:
            # `finetune` is nearest to finetune@travel, though half of the letters are missing.
            near = [stage for stage in known if stage.partition("@")[0] == name]
            near += difflib.get_close_matches(name, known, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"params.yaml: {section}.{name}: no such stage{hint}")


def in_order(
    graph: dict[str, set[str]],
    concurrency: int,
    start: Callable[[str, list[PrefectFuture]], PrefectFuture],
    ended: Callable[[str, State, float], bool],
) -> None:
    """Start each stage when those it depends on are done.

    Calls `ended` with the stage, its final state and its seconds. Once that says False nothing new
    is started, and what runs is waited for.
    """
    order = TopologicalSorter(graph)
    order.prepare()
    futures: dict[str, PrefectFuture] = {}
    began: dict[str, float] = {}
    finished: queue.Queue[str] = queue.Queue()
    ready: list[str] = []
    running, go_on = 0, True
    rank = {stage: place for place, stage in enumerate(graph)}
    while order.is_active():
        ready += sorted(order.get_ready(), key=rank.__getitem__)  # as dvc.yaml has them
        while ready and running < concurrency and go_on:
            stage = ready.pop(0)
            began[stage] = time.monotonic()
            futures[stage] = start(stage, [futures[up] for up in sorted(graph[stage])])
            futures[stage].add_done_callback(partial(_put, finished, stage))
            running += 1
        if not running:
            return
        stage = finished.get()
        running -= 1
        futures[stage].wait()
        if not ended(stage, futures[stage].state, time.monotonic() - began[stage]):
            go_on = False
        order.done(stage)


def _put(ended: queue.Queue[str], stage: str, _: PrefectFuture) -> None:
    ended.put(stage)


if __name__ == "__main__":
    optimize()
