"""`olivepress sweep`, `adopt` and `worker`: many candidates, on one machine or many."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import Json, in_project, print_json, quiet_prefect, stop

Pool = Annotated[str, typer.Option("-p", "--pool", metavar="NAME", help="Prefect work pool.")]


def sweep(
    file: Annotated[Path, typer.Argument(help="What is varied, wanted and limited.")] = Path(
        "sweep.yaml"
    ),
    pool: Pool = "olivepress",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Workers to start here for as long as it lasts.",
            show_default="1, or none if the pool has some",
        ),
    ] = None,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("-v", help="Show what the flow logs.")] = False,
) -> None:
    """Try many parameters, compute nothing twice, and say which are best within limits."""
    path = Path.cwd() / file
    with in_project() as root:
        from tasks import server
        from tasks.sweep import spec
        from tasks.terminal import terminal

        wanted = spec.load(path)
        quiet_prefect(verbose)
        api = server.ensure(root)
        terminal.quiet = as_json
        with _workers(root, pool, workers, as_json):
            try:
                state = _run(root, wanted.model_dump(mode="json"), pool)
            except KeyboardInterrupt:
                stop("stopped, and its candidates with it; what was finished is kept", 130)
        url = f"{server.ui_url(api)}/runs/flow-run/{state.state_details.flow_run_id}"
        _show(root, wanted.name, state, url, as_json)


def _run(root: Path, given: dict[str, Any], pool: str) -> Any:
    """The flow's final state."""
    from flows.sweep import sweep as flow
    from tasks import alive

    return alive.run(root, flow, {"given": given, "pool": pool})


def _show(root: Path, name: str, state: Any, url: str, as_json: bool) -> None:
    from stages.stage import read_json
    from tasks.sweep.results import FOLDER

    folder = root / FOLDER / name
    if as_json and (folder / "result.json").exists():
        kept = read_json(folder / "result.json")
        if url.endswith(kept["run"]):  # else it is of an earlier one
            print_json(kept | {"page": str(folder / "index.html"), "url": url})
    if not state.is_completed():
        stop(f"{state.message}\nThis run: {url}")
    if not as_json:
        typer.echo(f"\n{state.message}\nAdopt it: olivepress adopt {name}")
        typer.echo(f"All of them: {folder / 'index.html'}\nThis run: {url}")


@contextlib.contextmanager
def _workers(root: Path, pool: str, count: int | None, quiet: bool) -> Iterator[None]:
    """Workers in this clone until the end of the block; one if none was asked for and none is."""
    from tasks.pool import deployment

    deployment.ensure(pool)
    if count is None:
        count = 0 if deployment.workers(pool) else 1
    log = root / ".dvc/tmp/worker.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said, contextlib.ExitStack() as stack:
        for number in range(count):
            command = [sys.executable, "-m", "flows.cli", "worker", "--pool", pool]
            process = subprocess.Popen(
                [*command, "--name", f"sweep-{os.getpid()}-{number + 1}"],
                cwd=root, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
            stack.callback(_stop, process)
        if count and not quiet:
            typer.echo(f"{count} worker{'s' if count > 1 else ''} started here; log: {log}")
        yield


def _stop(process: subprocess.Popen) -> None:
    """End a worker as Ctrl-C does: it ends the processes of its runs."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def adopt(
    name: Annotated[str, typer.Argument(help="The sweep.")] = "sweep",
    candidate: Annotated[
        int | None, typer.Argument(help="Its number.", show_default="the best")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a candidate's params.yaml and dvc.lock; what it made is then restored, not computed."""
    with in_project() as root:
        from stages.reading import yaml_file, yaml_value
        from stages.stage import new_output
        from tasks import overrides
        from tasks.pool.workspace import remote_of
        from tasks.sweep import experiments, results

        result, one = results.kept(root, name, candidate)
        made = experiments.files(root, result["commit"], one["experiment"])
        changes = overrides.apply(root, result["base"] | one["overrides"])
        if "dvc.lock" in made:
            with new_output(root / "dvc.lock") as path:
                path.write_text(made["dvc.lock"], "utf-8")
        now = yaml_file(root / "params.yaml")
        differs = bool(made) and yaml_value(made["params.yaml"], "params.yaml of it") != now
        if as_json:
            print_json({"candidate": one["number"], "changes": changes})
            return
        for change in changes:
            typer.echo(f"params.yaml: {change}")
        if differs:
            typer.echo("params.yaml differs from the sweep's in other keys: some stages may run")
        bring = "olivepress pull && olivepress run" if remote_of(root) else "olivepress run"
        typer.echo(f"candidate {one['number']} of {name}; bring what it made here: {bring}")


def worker(
    pool: Pool = "olivepress",
    limit: Annotated[int, typer.Option(min=1, help="Candidates at once.")] = 1,
    name: Annotated[
        str | None, typer.Option(help="As it is shown.", show_default="host:folder")
    ] = None,
) -> None:
    """Serve a work pool from this clone, until Ctrl-C: candidates of sweeps are made here."""
    with in_project() as root:
        from tasks import doctor, remote, server

        os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "2")
        api = server.ensure(root)
        from tasks import alive
        from tasks.pool import gpu, machine, runs
        from tasks.pool import worker as serving
        from tasks.pool.workspace import remote_of

        where = remote_of(root)
        if where:
            remote.check(root, where)
        doctor.check_or_raise(root)
        alive.reap(root)
        gpu.announce()
        has = machine.this_machine(root)
        shares = f"shares through remote {where}" if where else "no remote, so nothing is shared"
        typer.echo(f"{has}; {shares}; server {api}")
        serving.serve(root, pool, limit, name or runs.clone(root))
