"""The flow of a sweep: candidates as child runs on a work pool, and what they found."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import ArtifactSort
from prefect.deployments import run_deployment
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, State

from flows import sweep_page
from flows.candidate import OVER, RESULT
from stages.errors import UserError
from tasks import bridge
from tasks.pool import deployment
from tasks.pool.claims import Pulse, Watch, patiently
from tasks.sweep import experiments, plan, results, spec
from tasks.sweep import results as outcome
from tasks.sweep.results import Candidate, Result
from tasks.sweep.search import Search
from tasks.terminal import terminal

LOOK_SECONDS = 2.0
QUIET_SECONDS = 60.0  # a worker polls every few seconds


@flow(name="sweep", log_prints=False, persist_result=False)
def sweep(
    file: str = "sweep.yaml", given: dict[str, Any] | None = None, pool: str = deployment.POOL
) -> Any:
    """Try parameters on a work pool, within limits, and say which are best.

    Args:
        file: the sweep.yaml, from the project's folder.
        given: what such a file would say, instead of one.
        pool: the work pool whose workers take the candidates.

    Returns:
        Completed with the best candidate as message; Failed when none meets the limits, or with
        what is wrong in sweep.yaml or in the project.
    """
    try:
        root = bridge.find_root()
        wanted = spec.check(given, "given") if given else spec.load(root / file)
        result = plan.begin(root, wanted)
        crew = Crew(root, result, pool)
        with Pulse(str(runtime.flow_run.id)):
            work(crew)
    except UserError as error:
        return Failed(message=str(error))
    best = result.best()
    if best is None:
        return Failed(message=f"none of {len(result.candidates)} candidates meets the limits")
    return Completed(message=f"best is candidate {best.number}: {sweep_page.words(best, result)}")


def work(crew: Crew) -> None:
    """Have all candidates tried; what is known is written down, however it ends."""
    try:
        while crew.hand_in():
            time.sleep(LOOK_SECONDS)
            crew.look()
    except BaseException:
        crew.cancel()
        raise
    finally:
        terminal.done("sweep")
        sweep_page.publish(crew.root, crew.result)


class Crew:
    """The candidates of a sweep and the flow runs that make them.

    Args:
        root: the project's folder.
        result: to fill in.
        pool: the work pool.
    """

    def __init__(self, root: Path, result: Result, pool: str) -> None:
        self.root, self.result, self.pool = root, result, pool
        self.name = deployment.ensure(pool)
        self.search = Search(result.spec)
        self.at_once = result.spec.parallel or (4 if result.spec.sampler == "tpe" else 10**6)
        self._trials: dict[int, Any] = {}
        self._began: dict[int, float] = {}
        self._watch = Watch()
        self._moved = time.monotonic()
        """When a candidate last began or ended."""

    @property
    def under_way(self) -> list[Candidate]:
        return [one for one in self.result.candidates if not one.ended]

    def hand_in(self) -> bool:
        """Give the pool as many candidates as may be under way; whether any are."""
        found = self.result.candidates
        while len(found) < self.result.spec.size and len(self.under_way) < self.at_once:
            asked = self.search.ask()
            if asked is None:
                break
            one = Candidate(len(found) + 1, asked[1])
            self._trials[one.number], self._began[one.number] = asked[0], time.monotonic()
            found.append(one)
            self._submit(one)
        return bool(self.under_way)

    def _submit(self, one: Candidate) -> None:
        """Make a flow run for a worker to take, a child of this one."""
        spec, changes = self.result.spec, self.result.base | one.overrides
        one.tries += 1
        needs = plan.needs(self.root, spec, changes)
        parameters = {"commit": self.result.commit, "overrides": changes, "limits": spec.limits}
        made = patiently(
            lambda _: run_deployment(
                self.name,
                parameters=parameters,
                flow_run_name=f"{spec.name}-{one.number:03}",
                timeout=0,
                idempotency_key=f"{runtime.flow_run.id}-{one.number}-{one.tries}",
                tags=[f"sweep: {spec.name}"],
                job_variables=deployment.ask(needs),
            )
        )
        one.run, one.state = str(made.id), outcome.WAITING  # type: ignore[union-attr]

    def look(self) -> None:
        """Take what has ended, and begin again what was on a machine that is lost."""
        by_run = {one.run: one for one in self.under_way}
        for run in patiently(lambda client: runs(client, list(by_run))):
            one, state = by_run[str(run.id)], run.state
            if state is None:
                continue
            if state.is_running() and not self._lives(run):
                state = Crashed(message="its machine was lost")
            if state.is_final():
                self._end(one, state)
            elif state.is_running() and one.state != outcome.RUNNING:
                one.state, self._moved = outcome.RUNNING, time.monotonic()
        done = [one for one in self.result.candidates if one.ended]
        running = sum(one.state == outcome.RUNNING for one in self.under_way)
        terminal.progress("sweep", len(done), self.result.spec.size, f"{running} running")
        self._say_who_is_missing()

    def _say_who_is_missing(self) -> None:
        """When nothing is under way but waiting: what a worker must have, and who there is."""
        waiting = [one for one in self.under_way if one.state == outcome.WAITING]
        quiet = time.monotonic() - self._moved > QUIET_SECONDS
        if len(waiting) < len(self.under_way) or not waiting or not quiet:
            return
        self._moved = time.monotonic()
        there = deployment.workers(self.pool)
        needs = plan.needs(self.root, self.result.spec, self.result.base | waiting[0].overrides)
        text = f"no worker has taken candidate {waiting[0].number}, which needs {needs}; "
        text += f"of pool {self.pool} there {', '.join(there) or 'is none: olivepress worker'}"
        get_run_logger().warning(text)
        terminal.note(text)

    def _lives(self, run: FlowRun) -> bool:
        """Whether a running candidate does; if not, it and its tasks are marked Crashed."""
        name = str(run.id)
        if patiently(lambda client: self._watch.alive(client, name)):
            return True
        patiently(lambda client: crash(client, run, "its machine was lost"))
        patiently(lambda client: self._watch.forget(client, name))
        return False

    def _end(self, one: Candidate, state: State) -> None:
        """Write down what came of a candidate."""
        assert one.run
        run = UUID(one.run)
        patiently(lambda client: end_tasks(client, run))
        if state.is_crashed() and one.tries <= self.result.spec.retries:
            get_run_logger().warning("candidate %s: %s; once more", one.number, state.message)
            self._submit(one)
            return
        sent = patiently(lambda client: sent_by(client, run))
        self._moved = time.monotonic()
        one.seconds = round(time.monotonic() - self._began[one.number], 1)
        one.message = state.message or state.name or ""
        one.state = outcome.FAILED
        if sent:
            one.figures, one.stages, one.machine = sent["figures"], sent["stages"], sent["machine"]
        if state.is_completed():
            one.state = outcome.OVER if state.name == OVER else outcome.MET
            one.experiment = f"{self.result.spec.name}-{one.number:03}"
            experiments.save(self.root, self.result.commit, one.experiment, sent)
        self.search.tell(self._trials[one.number], one.figures)
        terminal.ended(
            f"candidate {one.number}", one.state, sweep_page.words(one, self.result), one.seconds
        )
        results.write(self.root, self.result)

    def cancel(self) -> None:
        """Stop what is under way: workers end the processes of a run that is Cancelling."""
        for run in patiently(lambda client: runs(client, [one.run for one in self.under_way])):
            if run.state and not run.state.is_final():
                to: State = Cancelling() if run.state.is_running() else Cancelled()
                patiently(
                    partial(SyncPrefectClient.set_flow_run_state, flow_run_id=run.id, state=to)
                )


def runs(client: SyncPrefectClient, ids: list[str | None]) -> list[FlowRun]:
    """Flow runs by id; the server gives 200 at a time."""
    found: list[FlowRun] = []
    for start in range(0, len(ids), 200):
        some = [UUID(name) for name in ids[start : start + 200] if name]
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=some))
        found += client.read_flow_runs(flow_run_filter=chosen, limit=200)
    return found


def crash(client: SyncPrefectClient, run: FlowRun, message: str) -> None:
    """Mark a flow run as Crashed, whatever its process thinks."""
    client.set_flow_run_state(run.id, Crashed(message=message), force=True)


def end_tasks(client: SyncPrefectClient, run: UUID) -> None:
    """Mark what a run that has ended left running as Crashed: nobody else does."""
    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    for task in client.read_task_runs(flow_run_filter=chosen):
        if task.state and not task.state.is_final():
            client.set_task_run_state(task.id, Crashed(message="its run has ended"), force=True)


def sent_by(client: SyncPrefectClient, run: UUID) -> dict[str, Any]:
    """What a candidate left for the sweep; nothing if it did not come that far."""
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=[RESULT])
        ),
        sort=ArtifactSort.CREATED_DESC,
    )
    if not found:
        return {}
    return json.loads(str(found[0].data).removeprefix("```json\n").rpartition("```")[0])
