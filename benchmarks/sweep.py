"""What a sweep costs beside its stages, and what machines that work together spare.

    python benchmarks/sweep.py --grid [--alone 12] [--machines 1 2 3]
    python benchmarks/sweep.py --overhead
    python benchmarks/sweep.py --simulate CANDIDATES WORKERS [--sqlite]

Stages sleep, so that the cores of this machine act as those of several: what is measured is the
orchestration and not the arithmetic. Each table goes to standard output.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from benchmarks.server import Store, cpu_seconds, database, server  # noqa: E402

SLEEP = {"quantize": 12.0, "measure": 2.0, "export": 4.0, "finetune": 15.0, "evaluate": 5.0}
GROUPS, STEPS = [32, 64, 128], [100, 200, 300, 400]
SAMPLE_SECONDS = 3.0
MANY = 10_000  # candidates that the growth is extended to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--grid", action="store_true", help="1, 2 and 3 clones against runs alone")
    parser.add_argument("--alone", type=int, default=12, help="how many of the 12 to run alone")
    parser.add_argument("--machines", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--overhead", action="store_true", help="candidates that are all there")
    parser.add_argument("--simulate", type=int, nargs=2, metavar=("CANDIDATES", "WORKERS"))
    parser.add_argument("--sqlite", action="store_true", help="simulate on it, not on PostgreSQL")
    args = parser.parse_args()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("prefect", "dvc")]
    print(f"{os.cpu_count()} cores, {', '.join(versions)}", flush=True)
    on_postgres = bool(args.simulate) and not args.sqlite
    with (
        tempfile.TemporaryDirectory() as folder,
        database("PostgreSQL" if on_postgres else "SQLite", Path(folder)) as store,
        server(Path(folder), store.url) as (api, serving),
    ):
        home = Path(folder)
        os.environ |= {"PREFECT_API_URL": api, "PREFECT_HOME": folder, "DO_NOT_TRACK": "1"}
        if args.overhead:
            overhead(home / "overhead", api)
        if args.grid:
            grid(home / "grid", api, args.alone, args.machines)
        if args.simulate:
            simulate(home / "many", api, args.simulate, store, serving)


def table(*rows: tuple[str, ...]) -> None:
    """Print rows, the first of them the heading."""
    print("\n| " + " | ".join(rows[0]) + " |\n|---|" + "---:|" * (len(rows[0]) - 1))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


# Wall time of 1, 2 and 3 machines against runs that share nothing


def grid(home: Path, api: str, alone: int, machines: list[int]) -> None:
    """Sweep 3 quantizations x 4 finetunings on machines that share a server and a remote."""
    from test_sweep import build

    from tests.emulator.azurite import Azurite

    head = "", "seconds", "quantize", "export", "finetune", "evaluate"
    home.mkdir()
    rows = [one_by_one(home, api, alone)]
    note(rows[0])
    with Azurite(home / "azurite") as azurite:
        for count in machines:
            folder = home / f"workers-{count}"
            folder.mkdir()
            world = build(folder, azurite, api)
            with ExitStack() as stack:
                for number in range(count):
                    stack.enter_context(world.machine(number, sleep=SLEEP))
                wait_for_workers(folder, count)
                started = time.perf_counter()
                process = world.begin(
                    name=f"grid-{count}",
                    space={"quantize.group_size": GROUPS, "finetune.max_steps": STEPS},
                )
                errors = process.communicate()[1]
                seconds = time.perf_counter() - started
            if process.returncode:
                sys.exit(errors)
            rows.append((f"a sweep on {count}", f"{seconds:.0f}", *counts(world.ran())))
            note(rows[-1])
    print(f"stages sleep {SLEEP} s; {alone} of the 12 runs were made alone")
    table(head, *rows)


def note(row: tuple[str, ...]) -> None:
    """Say at once what is known: the table comes after the last row."""
    print("…", *row, file=sys.stderr, flush=True)


def one_by_one(home: Path, api: str, alone: int) -> tuple[str, ...]:
    """The same parameters by `olivepress run`, each in a fresh clone with a cache of its own."""
    from sweeping import clone, make

    from conftest import sh

    folder = home / "alone"
    folder.mkdir()
    project, ran = make(folder / "project"), folder / "ran"
    env = {"PREFECT_API_URL": api, "RAN": str(ran), "SLEEP": json.dumps(SLEEP)}
    every = [(group, steps) for group in GROUPS for steps in STEPS]
    started = time.perf_counter()
    for number, (group, steps) in enumerate(every[:alone]):
        here = clone(project, folder / f"clone{number}")
        values = f"-Squantize.group_size={group}", f"-Sfinetune.max_steps={steps}"
        sh("olivepress", "run", *values, cwd=here, **env)
    seconds = (time.perf_counter() - started) * len(every) / alone
    ran_here = Counter(line.split()[0] for line in ran.read_text().splitlines())
    scaled = Counter({name: count * len(every) // alone for name, count in ran_here.items()})
    return "12 runs, one after the other", f"{seconds:.0f}", *counts(scaled)


def counts(ran: Counter[str]) -> list[str]:
    """How often each stage of the heading ran."""
    names = "quantize", "export", "finetune@travel", "evaluate@travel"
    return [str(ran[name]) for name in names]


def wait_for_workers(folder: Path, count: int) -> None:
    """Until each has said what its machine has, after which it asks for work."""
    from sweeping import wait_until

    wait_until(lambda: sum("; server " in p.read_text() for p in folder.glob("*.log")) == count)


# What a candidate costs when all its stages are there


@dataclass
class Candidate:
    """When things happened to a candidate, in seconds since the epoch."""

    submitted: float
    taken: float
    """By a worker, which starts a process."""
    begun: float
    """The flow, after imports."""
    first_task: float
    last_task: float
    ended: float


def candidate(run: str) -> Candidate:
    """From the states of its flow run and the task runs in it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(UUID(run))
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(run)]))
        tasks = client.read_task_runs(flow_run_filter=chosen)
    when = {}
    for state in sorted(states, key=lambda one: one.timestamp, reverse=True):
        when[state.type.value] = state.timestamp.timestamp()
    return Candidate(
        when["SCHEDULED"],
        when["PENDING"],
        when["RUNNING"],
        min(task.start_time.timestamp() for task in tasks if task.start_time),
        max(task.end_time.timestamp() for task in tasks if task.end_time),
        when["COMPLETED"],
    )


def overhead(home: Path, api: str) -> None:
    """Sweep 6 candidates twice with one worker; the second time every stage is restored."""
    from sweeping import machine, make
    from test_sweep import World

    home.mkdir()
    world: Any = World(make(home / "project"), [], None, api)  # type: ignore[arg-type]
    with machine(world.project, api, "machine-0") as here:
        wait_for_workers(home, 1)
        world.sweep(name="first")
        worker = psutil.Process(here.process.pid)
        cpu, started = cpu_seconds(worker), time.perf_counter()
        result = world.sweep(name="second")
        seconds, cpu = time.perf_counter() - started, cpu_seconds(worker) - cpu
    computed = sum(result["executed"].values())
    found = sorted((candidate(one["run"]) for one in result["candidates"]), key=lambda c: c.taken)
    parts = [[end - begin for begin, end in pairwise(astuple(one)[1:])] for one in found]
    middle = [statistics.median(part) for part in zip(*parts, strict=True)]
    between = [later.taken - one.ended for one, later in pairwise(found)]
    number = len(found)
    whole = (found[-1].ended - found[0].taken) / number
    print(f"{number} candidates, {computed} stages computed, the command took {seconds:.1f} s")
    names = (
        "process start and imports",
        "workspace, parameters, graph",
        "stages: 5, all restored",
        "figures, artifacts, workspace removed",
    )
    table(
        ("of a candidate", "seconds"),
        ("in all", f"{whole:.2f}"),
        *((name, f"{part:.2f}") for name, part in zip(names, middle, strict=True)),
        ("until the worker takes the next", f"{statistics.median(between):.2f}"),
        ("CPU of worker and candidate", f"{cpu / number:.2f}"),
    )


# Many candidates on many workers


@dataclass
class Sample:
    """What the server had come to at one moment."""

    seconds: float
    ended: int
    """Candidates."""
    server_cpu: float
    database_cpu: float
    rss_mb: float
    variables: int
    database_mb: float


def ask(api: str, path: str, given: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"{api}/{path}", json.dumps(given or {}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def sample(api: str, store: Store, serving: psutil.Process, started: float) -> Sample:
    done = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    everything = [serving, *serving.children(recursive=True)]
    return Sample(
        time.perf_counter() - started,
        ask(api, "flow_runs/count", done),
        cpu_seconds(serving),
        cpu_seconds(store.process),
        sum(one.memory_info().rss for one in everything) / 1e6,
        ask(api, "variables/count"),
        store.size() / 1e6,
    )


def simulate(home: Path, api: str, size: list[int], store: Store, serving: psutil.Process) -> None:
    """Sweep 4 quantizations x CANDIDATES/4 finetunings with workers of one clone."""
    candidates, workers = size
    from sweeping import machine, make
    from test_sweep import World

    home.mkdir()
    world: Any = World(make(home / "project"), [], None, api)  # type: ignore[arg-type]
    space = {
        "quantize.bits": [4, 8],
        "quantize.group_size": [32, 128],
        "finetune.max_steps": list(range(100, 100 + candidates // 4)),
    }
    with ExitStack() as stack:
        made = [
            stack.enter_context(machine(world.project, api, f"machine-{n}", sleep=SLEEP))
            for n in range(workers)
        ]
        wait_for_workers(home, workers)
        there = [psutil.Process(one.process.pid) for one in made]
        cpu = sum(map(cpu_seconds, there))
        started = time.perf_counter()
        samples = [sample(api, store, serving, started)]
        process = world.begin(name="many", space=space)
        with ThreadPoolExecutor(1) as thread:
            said = thread.submit(process.communicate)
            while not said.done():
                wait([said], SAMPLE_SECONDS)
                samples.append(sample(api, store, serving, started))
        cpu = sum(map(cpu_seconds, there)) - cpu
    if process.returncode:
        sys.exit(said.result()[1])
    say(json.loads(said.result()[0]), world.ran(), samples, cpu, workers)
    logs = [home.parent / "log", *home.glob("*.log")]
    text = "".join(path.read_text("utf-8", "replace") for path in logs)
    print(f"errors in the logs: {text.count('| ERROR ')}, tracebacks: {text.count('Traceback')}")


def say(
    result: dict[str, Any],
    ran: Counter[str],
    samples: list[Sample],
    cpu: float,
    workers: int,
) -> None:
    """Print what a simulation came to, and what of it grows."""
    number = len(result["candidates"])
    met = sum(one["state"] == "met" for one in result["candidates"])
    times = [candidate(one["run"]) for one in result["candidates"] if one["state"] == "met"]
    waits = [one.begun - one.submitted for one in times]
    starts = [one.begun - one.taken for one in times]
    tail = SLEEP["finetune"] + SLEEP["evaluate"]
    overs = [one.ended - one.taken - tail for one in times]
    needed = sum(count * SLEEP[name.partition("@")[0]] for name, count in ran.items())
    first, last = samples[0], samples[-1]
    wall = last.seconds
    server_cpu = last.server_cpu - first.server_cpu
    database_cpu = last.database_cpu - first.database_cpu
    print(
        f"{number} candidates ({met} met), {workers} workers in one clone; stages run: {dict(ran)}"
    )
    print(f"stages sleep {SLEEP} s")
    table(
        ("", "median", "largest"),
        ("submission to begin, s", f"{statistics.median(waits):.1f}", f"{max(waits):.1f}"),
        ("taken by a worker to begin, s", f"{statistics.median(starts):.1f}", f"{max(starts):.1f}"),
        ("a candidate beside its finetune and evaluate, s", f"{statistics.median(overs):.1f}",
         f"{max(overs):.1f}"),
    )  # fmt: skip
    table(
        ("", "value"),
        ("wall time, s", f"{wall:.0f}"),
        ("needed stage seconds / workers, s", f"{needed / workers:.0f}"),
        ("CPU of workers and candidates, s per candidate", f"{cpu / number:.2f}"),
        ("server, share of a core", f"{server_cpu / wall:.0%}"),
        ("database, share of a core", f"{database_cpu / wall:.0%}"),
        ("server RSS, MB, first and last", f"{first.rss_mb:.0f}, {last.rss_mb:.0f}"),
        ("Prefect variables, most and at the end",
         f"{max(one.variables for one in samples)}, {last.variables}"),
    )  # fmt: skip
    grows(samples)


def grows(samples: list[Sample]) -> None:
    """Print what a line through the samples gives for each candidate, and for many of them."""
    rows = [("grows by", "a candidate", f"{MANY:,} candidates")]
    units = {"database_mb": "MB", "server_cpu": "s", "database_cpu": "s", "rss_mb": "MB"}
    ended = [one.ended for one in samples]
    for name, unit in units.items():
        values = [getattr(one, name) for one in samples]
        slope = statistics.linear_regression(ended, values).slope
        rows.append((name, f"{slope:.3f} {unit}", f"{slope * MANY:,.0f} {unit}"))
    table(*rows)


if __name__ == "__main__":
    main()
