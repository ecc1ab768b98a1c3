"""The `olivepress` command."""

from __future__ import annotations

import atexit
import gc
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows import exporting, fleet, harness, proof, release, serving, share, talk
from flows import verify as verifying
from flows.console import Json, console, in_project, print_json, quiet_prefect, stop, without_gc
from stages.errors import UserError

app = typer.Typer(
    help="Turn a small language model and a file of examples into a tested on-device model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Python's last collection looks at all that was imported: 0.2 s of a status, 0.4 s of a run.
atexit.register(gc.freeze)
MARKS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@app.command()
def run(
    set_: Annotated[
        list[str] | None,
        typer.Option("-S", "--set", metavar="KEY=VALUE", help="Change params.yaml first."),
    ] = None,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("-v", help="Show what the stages print.")] = False,
) -> None:
    """Bring every stage up to date: what has not changed is not computed again."""
    with in_project() as root:
        from tasks import overrides

        _pipeline(root, overrides.parse(set_ or []), as_json, verbose)


def _pipeline(root: Path, values: dict[str, Any], as_json: bool, verbose: bool) -> str:
    """Run the flow and show what it did; its address in the UI."""
    from tasks import server
    from tasks.terminal import terminal

    quiet_prefect(verbose)
    api = server.ensure(root)
    from flows import summary

    terminal.quiet = as_json
    try:
        state = _run_flow(root, values)
    except KeyboardInterrupt:
        stop("stopped; what was finished is kept", 130)
    url = f"{server.ui_url(api)}/runs/flow-run/{state.state_details.flow_run_id}"
    if as_json:
        rows = [asdict(row) for row in state.result(raise_on_failure=False) or []]
        print_json({"stages": rows, "metrics": summary.metrics(root), "url": url})
    if not state.is_completed():
        stop(f"{state.message}\nThis run: {url}")
    if not as_json:
        console.print()
        found = summary.metrics(root)
        console.print(summary.table(found))
        for remark in summary.remarks(found):
            console.print(remark, style="dim")
        typer.echo(f"\nThis run: {url}")
        if found:
            typer.echo("Pictures: olivepress report --open")
    return url


def _run_flow(root: Path, values: dict[str, Any]) -> Any:
    """The flow's final state."""
    with without_gc():
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.optimize import optimize
        from tasks import alive

    # The heartbeat tells a server that a worker's flow lives; joining its thread costs 0.9 s here.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        return alive.run(root, optimize, {"overrides": values})


@app.command()
def status(as_json: Json = False) -> None:
    """Say for each stage whether it is up to date, or stale and why."""
    with without_gc(), in_project() as root:
        from stages import params
        from tasks import bridge

        params.load()
        needs = bridge.status(root)
        if as_json:
            print_json({name: asdict(need) for name, need in needs.items()})
            return
        for name, need in needs.items():
            if need.action == "unchanged":
                console.print(f"[green]up to date[/]  {name}")
            else:
                word = "restorable" if need.action == "restore" else "stale     "
                console.print(f"[yellow]{word}[/]  {name}: ", end="")
                console.print("; ".join(need.reasons), markup=False)


@app.command()
def report(
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.", show_default="report")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
    as_json: Json = False,
) -> None:
    """Write the figures, pictures, answers, gates and origins of what is there as one page."""
    folder = Path.cwd() / out if out else None
    with in_project() as root:
        from flows import report as reports

        written = reports.write(root, folder or root / reports.FOLDER)
        if as_json:
            print_json(written.as_json())
        else:
            typer.echo(written.page)
        if open_:
            typer.launch(written.page.as_uri())


app.command()(talk.generate)
app.command()(talk.chat)
app.command()(serving.serve)
app.command()(exporting.export)
app.command("lm-eval")(harness.lm_eval)
app.command()(proof.sign)
app.command()(release.publish)
app.command()(share.push)
app.command()(share.pull)
app.command()(verifying.verify)
app.command()(fleet.sweep)
app.command()(fleet.adopt)
app.command()(fleet.worker)


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="A folder that PEFT wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="NAME.onnx_adapter")
    ] = None,
) -> None:
    """Make a LoRA adapter that was trained elsewhere on the base model fit the exported one."""
    source = Path.cwd() / adapter
    target = Path.cwd() / (out or f"{source.name}.onnx_adapter")
    with in_project():
        from stages.convert import convert as convert_adapter
        from stages.stage import ONNX, new_output

        if not (ONNX / "adapter_inputs.json").exists():
            raise UserError(f"{ONNX} is not there yet; olivepress run makes it")
        with new_output(target) as path, redirect_stdout(sys.stderr):
            convert_adapter(source, ONNX, path)
    typer.echo(f'{target}\nTry it: olivepress generate "…" --adapter {target}')


@app.command()
def lineage(
    path: Annotated[Path, typer.Argument(help="A file or folder that a stage made.")],
    as_json: Json = False,
) -> None:
    """Say what made a file: command, inputs, parameters, versions, commit, run and when."""
    path = Path.cwd() / path
    with in_project() as root:
        from tasks import lineage as origins

        chain = origins.trace(root, path)
        if as_json:
            print_json([asdict(origin) for origin in chain])
            return
        for origin in chain:
            _print_origin(origin)


def _print_origin(origin: Any) -> None:
    record = origin.record
    console.print(f"[bold]{origin.stage}[/]  {', '.join(origin.outputs)}")
    commit = (record.get("git_commit") or "unknown")[:12]
    lines = {
        "command": origin.command,
        "made": f"{record.get('started', 'unknown')}, in {record.get('seconds', '?')} s",
        "run": record.get("run_id") or "dvc repro",
        "commit": commit + (" with local changes" if record.get("git_dirty") else ""),
        "key": origin.key,
        "params": ", ".join(f"{k}={v}" for k, v in origin.params.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items()),
    }
    for name, value in lines.items():
        if value:
            console.print(f"  {name:<9} {value}", markup=False)
    for path, digest in origin.inputs.items():
        console.print(f"  {'input':<9} {path}  {digest}", markup=False)
    for path in origin.changed:
        word = "changed since: not what this stage made" if Path(path).exists() else "missing"
        console.print(f"  {'warning':<9} {path}: {word}", markup=False, style="yellow")
    console.print()


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, memory, disk and GPU against what the chosen model will need."""
    with in_project() as root:
        from tasks import doctor as checks

        found = checks.report(root)
        if as_json:
            print_json([asdict(check) for check in found])
        else:
            table = Table(box=None, show_header=False, pad_edge=False)
            for check in found:
                table.add_row(
                    check.name, f"[{MARKS[check.verdict]}]{check.verdict}[/]", check.message
                )
            console.print(table)
        if any(check.verdict == "problem" for check in found):
            raise typer.Exit(1)


@app.command()
def ui() -> None:
    """Start the Prefect server if none answers, and say where its pages are."""
    with in_project() as root:
        from tasks import server

        api = server.ensure(root)
        from tasks import alive

        alive.reap(root)
        typer.echo(server.ui_url(api))


@app.command()
def down() -> None:
    """Stop the Prefect server that was started here."""
    with in_project() as root:
        from tasks import server

        typer.echo("stopped" if server.stop(root) else "nothing was running")


DEMO_QUESTION = "What should I eat in Lisbon?"


@app.command()
def demo() -> None:
    """Run everything, then ask one travel question with the adapter off and on."""
    with in_project() as root:
        url = _pipeline(root, {}, as_json=False, verbose=False)
        session = talk.open_session()
        console.print(f"\n[bold]{DEMO_QUESTION}[/]")
        for label, name in (("adapter off", None), ("adapter on", session.adapters[0])):
            console.print(f"  [dim]{label:<12}[/]", end="")
            for piece in session.stream(DEMO_QUESTION, name, max_new_tokens=48):
                print(piece, end="", flush=True)
            print()
        typer.echo(f"\nLook at the run: {url}")
        typer.echo('Ask for yourself: .venv/bin/olivepress generate "…"')


if __name__ == "__main__":
    app()
