"""What a server bears when many write to it at once: SQLite against PostgreSQL.

    python benchmarks/server.py [--tasks 1000] [--workers 4] [--json FILE]

Each worker is a process with a flow of empty task runs. A run counts once the server has recorded
it, which is after the flow has ended. Server, database and workers share this machine; PostgreSQL
is Debian's, with the settings it comes with.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

LIMIT_SECONDS = 240  # for one database
COMPLETED = b'{"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}'
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, default=1000, help="task runs in all")
    parser.add_argument("--workers", type=int, default=4, help="processes that make them")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    rows = []
    for name in ("SQLite", "PostgreSQL"):
        with tempfile.TemporaryDirectory() as home:
            rows.append(measure(name, Path(home), args.tasks, args.workers))
    versions = {name: importlib.metadata.version(name) for name in ("prefect", "asyncpg")}
    print(f"{args.tasks} task runs, {args.workers} workers, {os.cpu_count()} cores, ", end="")
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    print("| " + " | ".join(rows[0]) + " |\n|---|" + "---:|" * (len(rows[0]) - 1))
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")


def worker(tasks: int) -> None:
    """A flow of so many task runs, once its standard input says go."""
    from prefect import flow, task

    @task
    def nothing(number: int) -> int:
        return number

    @flow
    def many() -> None:
        for number in range(tasks):
            nothing(number)

    print("ready", flush=True)
    sys.stdin.readline()
    many()


def measure(name: str, home: Path, tasks: int, workers: int) -> Row:
    """Run the workers against a new server on one kind of database."""
    print(f"… {name}", file=sys.stderr, flush=True)
    with database(name, home) as store, server(home, store.url) as (api, serving):
        load(api, home, 1, 1)  # warm-up
        before = cpu_seconds(serving), cpu_seconds(store.process)
        ended, recorded = load(api, home, tasks, workers)
        by_server = cpu_seconds(serving) - before[0]
        by_database = cpu_seconds(store.process) - before[1]
        size = store.size()
    log = (home / "log").read_text("utf-8", "replace")
    return {
        "database": store.version,
        "flows ended, s": f"{ended:.1f}",
        "all recorded, s": f"{recorded:.1f}",
        "task runs/s": f"{tasks / recorded:.0f}",
        "server, share of a core": f"{by_server / recorded:.0%}",
        "database, share of a core": f"{by_database / recorded:.0%}" if store.process else "",
        "database, MB": f"{size / 1e6:.1f}",
        '"database is locked"': str(log.count("database is locked")),
        "errors in the log": str(log.count("| ERROR ")),
    }


@dataclass
class Store:
    version: str
    url: str
    size: Callable[[], int]
    """Bytes."""
    process: psutil.Process | None = None


@contextlib.contextmanager
def database(name: str, home: Path) -> Iterator[Store]:
    """An empty database."""
    if name == "SQLite":
        file = home / "prefect.db"
        url = f"sqlite+aiosqlite:///{file}"
        version = f"SQLite {sqlite3.sqlite_version}"
        yield Store(version, url, lambda: sum(p.stat().st_size for p in home.glob("prefect.db*")))
        return
    from tests.postgres import Postgres

    with Postgres() as running:
        yield Store(
            f"PostgreSQL {running.query('SHOW server_version').split()[0]}",
            running.url,
            lambda: int(running.query("SELECT pg_database_size('prefect')")),
            psutil.Process(running.process.pid),
        )


@contextlib.contextmanager
def server(home: Path, url: str) -> Iterator[tuple[str, psutil.Process]]:
    """Prefect's server on a database, its output in `log`; yields its address."""
    from tasks.server import START_SECONDS, answers, free_port

    port = free_port(4300)
    api = f"http://127.0.0.1:{port}/api"
    env = environment(home, PREFECT_SERVER_DATABASE_CONNECTION_URL=url)
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not answers(api):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit((home / "log").read_text("utf-8", "replace"))
            time.sleep(0.2)
        yield api, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def load(api: str, home: Path, tasks: int, workers: int) -> tuple[float, float]:
    """Seconds until the last worker's flow ended, and until the server has recorded every run.

    Workers start when all have imported Prefect.
    """
    share = [tasks // workers + (number < tasks % workers) for number in range(workers)]
    known = recorded(api)
    env = environment(home, PREFECT_API_URL=api, PREFECT_LOGGING_LEVEL="WARNING")
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(count)],
            cwd=home,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for count in share
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == b"ready\n"
    started = time.perf_counter()
    for process in processes:
        assert process.stdin
        process.stdin.close()
    for process in processes:
        if process.wait():
            sys.exit("a worker failed")
    ended = time.perf_counter() - started
    while (missing := known + tasks - recorded(api)) > 0:
        if time.perf_counter() - started > LIMIT_SECONDS:
            sys.exit(f"{missing} task runs are not recorded after {LIMIT_SECONDS} s")
        time.sleep(0.2)
    return ended, time.perf_counter() - started


def environment(home: Path, **values: str) -> dict[str, str]:
    """The environment without settings of Prefect that the user has."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return {**kept, **quiet, "PREFECT_HOME": str(home), **values}


def recorded(api: str) -> int:
    """How many task runs the server knows to be completed."""
    request = urllib.request.Request(
        f"{api}/task_runs/count", COMPLETED, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return int(reply.read())


def cpu_seconds(process: psutil.Process | None) -> float:
    """Of a process and its children; those that have ended are in their parent's sum."""
    if process is None:
        return 0.0
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # PostgreSQL's come and go
            total += sum(one.cpu_times()[:4])
    return total


if __name__ == "__main__":
    main()
