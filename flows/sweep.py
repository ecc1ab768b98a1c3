"""The flow of a sweep: candidates as child runs on a work pool, and what they found."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Cancelled, Completed, Crashed, Failed, Scheduled, State

from flows import sweep_page
from flows.candidate import OVER, RESULT
from stages.errors import UserError
from tasks import alive, bridge
from tasks.pool import deployment, runs
from tasks.pool.claims import CLEAN_UP_SECONDS, Pulse, Watch, patiently
from tasks.sweep import experiments, plan, results, spec
from tasks.sweep import results as outcome
from tasks.sweep.results import Candidate, Result
from tasks.sweep.search import Search
from tasks.terminal import terminal

LOOK_SECONDS = 2.0
AT_ONCE = 200  # candidates that wait or run: a look asks the server for each
CANCEL_SECONDS = 60.0  # for workers to end the processes of what was cancelled
WRITE_SECONDS = 5.0  # between writings of result.json
START = timedelta(seconds=120)  # for a worker to start a candidate's process
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
        alive.here(root)
        wanted = spec.check(given, "given") if given else spec.load(root / file)
        crew = Crew(root, plan.begin(root, wanted, str(runtime.flow_run.id)), pool)
        with Pulse(crew.result.run):
            work(crew)
    except Stopped:
        return Cancelled(message="cancelled, and its candidates with it")
    except UserError as error:
        return Failed(message=str(error))
    terminal.show(sweep_page.table(crew.result))
    best = crew.result.best()
    if best is None:
        return Failed(message=why_none(crew.result))
    return Completed(
        message=f"best is candidate {best.number}: {sweep_page.words(best, crew.result)}"
    )


def why_none(result: Result) -> str:
    """Why no candidate is the best."""
    met = [one for one in result.candidates if one.state == outcome.MET]
    for name in result.spec.objectives:
        if met and all(one.figures.get(name) is None for one in met):
            return f"{name} was measured for no candidate, so none is the best"
    return f"none of {len(result.candidates)} candidates meets the limits"


class Stopped(Exception):
    """Somebody has cancelled the sweep."""


def work(crew: Crew) -> None:
    """Have all candidates tried; what is known is written down, however it ends."""
    try:
        while crew.hand_in():
            time.sleep(LOOK_SECONDS)
            crew.look()
    except BaseException:
        with suppress(UserError):
            patiently(crew.cancel, CLEAN_UP_SECONDS)
        raise
    finally:
        terminal.done("sweep")
        try:
            sweep_page.publish(crew.root, crew.result)
        except Exception as error:  # what ended the sweep is worth more than its page
            get_run_logger().warning("no page was written: %s", error, exc_info=True)


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
        self.size = result.spec.size
        self.at_once = result.spec.parallel or (4 if result.spec.sampler == "tpe" else AT_ONCE)
        self._trials: dict[int, Any] = {}
        self._began: dict[int, float] = {}
        self._watch = Watch()
        self._moved = self._written = time.monotonic()
        """When a candidate last began or ended; when the result was last written."""

    @property
    def under_way(self) -> list[Candidate]:
        return [one for one in self.result.candidates if not one.ended]

    def hand_in(self) -> bool:
        """Give the pool as many candidates as may be under way; whether any are."""
        found, under_way = self.result.candidates, len(self.under_way)
        while len(found) < self.size and under_way < self.at_once:
            asked = self.search.ask()
            if asked is None:
                text = f"the space holds no other candidate: {len(found)} of {self.size}"
                terminal.note(text)
                self.size = len(found)
                break
            one = Candidate(len(found) + 1, asked[1])
            self._trials[one.number], self._began[one.number] = asked[0], time.monotonic()
            found.append(one)
            self._submit(one)
            under_way += not one.ended
        return len(found) < self.size or under_way > 0

    def _submit(self, one: Candidate) -> None:
        """Make a flow run for a worker to take, a child of this one."""
        spec, changes = self.result.spec, self.result.base | one.overrides
        one.tries += 1
        try:
            needs = plan.needs(self.root, self.result, changes)
        except UserError as error:  # values that do not go together
            return self._close(one, outcome.FAILED, str(error))
        parameters = {
            "commit": self.result.commit,
            "overrides": changes,
            "limits": spec.limits,
            "sweep": self.result.run,
        }
        made: Any = patiently(
            lambda _: run_deployment(
                self.name,
                parameters=parameters,
                flow_run_name=f"{spec.name}-{one.number:03}",
                timeout=0,
                idempotency_key=f"{self.result.run}-{one.number}-{one.tries}",
                tags=[f"sweep: {spec.name}"],
                job_variables=deployment.ask(needs),
            )
        )
        one.run, one.state = str(made.id), outcome.WAITING

    def look(self) -> None:
        """Take what has ended, and begin again what was on a machine that is lost.

        Raises:
            Stopped: this sweep was cancelled.
        """
        own = patiently(lambda client: client.read_flow_run(UUID(self.result.run)))
        if own.state and (own.state.is_cancelling() or own.state.is_cancelled()):
            raise Stopped
        ids = [UUID(one.run) for one in self.under_way if one.run]
        there = {str(run.id): run for run in patiently(lambda client: runs.find(client, ids))}
        for one in self.under_way:
            run = there.get(one.run or "")
            state = self._state(run) if run else Crashed(message="its run was deleted")
            if state.is_final():
                self._end(one, state)
            elif state.is_running() and one.state != outcome.RUNNING:
                one.state, self._moved = outcome.RUNNING, time.monotonic()
        done = self.size - len(self.under_way) if self.size == len(self.result.candidates) else 0
        running = sum(one.state == outcome.RUNNING for one in self.under_way)
        terminal.progress("sweep", done, self.size, f"{running} running")
        self._say_who_is_missing()

    def _state(self, run: FlowRun) -> State:
        """A candidate's state; Crashed, and marked so, if it began and shows no sign of life."""
        state, name = run.state, str(run.id)
        if state is None or state.is_final() or state.is_scheduled():
            return state or Scheduled()
        alive = patiently(lambda client: self._watch.alive(client, name))
        starting = state.is_pending() and datetime.now(UTC) - state.timestamp < START
        if alive or starting:
            return state
        patiently(lambda client: runs.crash(client, run.id, "its machine was lost"))
        return Crashed(message="its machine was lost")

    def _say_who_is_missing(self) -> None:
        """When nothing is under way but waiting: what a worker must have, and who there is."""
        waiting = [one for one in self.under_way if one.state == outcome.WAITING]
        quiet = time.monotonic() - self._moved > QUIET_SECONDS
        if len(waiting) < len(self.under_way) or not waiting or not quiet:
            return
        self._moved = time.monotonic()
        there = deployment.workers(self.pool)
        needs = plan.needs(self.root, self.result, self.result.base | waiting[0].overrides)
        text = f"no worker has taken candidate {waiting[0].number}, which needs {needs}; "
        text += f"pool {self.pool} has {', '.join(there) or 'none: olivepress worker starts one'}"
        get_run_logger().warning(text)
        terminal.note(text)

    def _end(self, one: Candidate, state: State) -> None:
        """Take what a candidate left, or begin it again if its machine was lost."""
        run = UUID(one.run or "")
        if not state.is_completed():
            patiently(lambda client: runs.end_tasks(client, run))
            patiently(lambda client: self._watch.forget(client, str(run)))
        if state.is_crashed() and one.tries <= self.result.spec.retries:
            get_run_logger().warning("candidate %s: %s; once more", one.number, state.message)
            return self._submit(one)
        sent = patiently(lambda client: runs.sent_by(client, run, RESULT))
        if sent:
            one.figures, one.stages, one.machine = sent["figures"], sent["stages"], sent["machine"]
        if not state.is_completed() or not sent:
            return self._close(one, outcome.FAILED, state.message or state.name or "")
        name = f"{self.result.spec.name}-{one.number:03}"
        try:
            experiments.save(self.root, self.result.commit, name, sent)
            one.experiment = name
        except UserError as error:
            get_run_logger().warning("candidate %s is no experiment: %s", one.number, error)
        ended = outcome.OVER if state.name == OVER else outcome.MET
        return self._close(one, ended, state.message or "")

    def _close(self, one: Candidate, state: str, message: str) -> None:
        """Write down what came of a candidate."""
        self._moved = time.monotonic()
        one.seconds = round(self._moved - self._began[one.number], 1)
        one.state, one.message = state, message
        self.search.tell(self._trials[one.number], one.figures)
        words = sweep_page.words(one, self.result)
        terminal.ended(f"candidate {one.number}", one.state, words, one.seconds)
        if self._moved - self._written > WRITE_SECONDS:
            self._written = self._moved
            results.write(self.root, self.result)

    def cancel(self, client: SyncPrefectClient) -> None:
        """Stop what is under way, and mark what it leaves: nobody else will."""
        own = UUID(self.result.run)
        runs.cancel_children(client, own)
        deadline = time.monotonic() + CANCEL_SECONDS
        found = runs.children(client, own)
        while time.monotonic() < deadline and not all(map(runs.ended, found)):
            time.sleep(1)
            found = runs.children(client, own)
        for run in found:
            if run.state and not run.state.is_completed():
                runs.end_tasks(client, run.id)
        runs.end_tasks(client, own)
