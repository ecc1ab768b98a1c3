"""`olivepress verify`: whether all bytes are those that were recorded, and bringing them back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from flows import proof
from flows.console import Json, console, in_project, print_json, stop
from stages.errors import on_one_line

if TYPE_CHECKING:
    from tasks.repair import Repair
    from tasks.verify import Finding, Report
    from tasks.verify import Progress as OnProgress


def verify(  # noqa: PLR0917
    package: Annotated[
        Path | None, typer.Argument(help="Check this package instead.", show_default=False)
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Bring back what is damaged: from here, the remote, a stage."
        ),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(envvar="OLIVEPRESS_VERIFYING_KEY", help="Public key of who signed, in PEM."),
    ] = None,
    identity: Annotated[
        str, typer.Option(help="Who signed with Sigstore, such as a mail address.")
    ] = "",
    issuer: Annotated[str, typer.Option(help="Who vouches for it: the address of a login.")] = "",
    trust_config: Annotated[
        Path | None, typer.Option(help="A Sigstore other than sigstore.dev: its keys, in JSON.")
    ] = None,
    signature: Annotated[
        Path | None, typer.Option(help="Its file.", show_default="model.sig, there or beside")
    ] = None,
    signed: Annotated[
        bool, typer.Option("--signed", help="Fail if not signed, or by whom is not checked.")
    ] = False,
    project: Annotated[
        bool, typer.Option("--project/--no-project", help="Compare with the project's dvc.lock.")
    ] = True,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make it again from its commit, without a cache.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every output, input and object of the cache, and name what is not as recorded.

    With PACKAGE: check its files, signature, bill of materials, card and lineage; all options but
    --repair are for that. Exit code 0 if all is sound, 1 if not. What was not checked is said, and
    is no failure.
    """
    if package:
        if repair:
            stop("--repair is for the project; a package is made again by olivepress run")
        proof.check(
            package,
            key=key,
            identity=identity,
            issuer=issuer,
            trust_config=trust_config,
            signature=signature,
            signed=signed,
            project=project,
            rebuild=rebuild,
            as_json=as_json,
        )
        return
    if signed or rebuild or signature or identity or issuer or trust_config or not project:
        stop("that option needs a PACKAGE, for instance models/package")
    with in_project() as root:
        from tasks import repair as repairs
        from tasks import verify as checks

        with _bar() as on_progress:
            if repair:
                mending = repairs.repair(root, on_progress, _say)
                report = mending.after
            else:
                mending, report = None, checks.check(root, on_progress)
    if as_json:
        print_json(_as_json(report, mending))
    else:
        _show(report, mending)
    if not report.sound:
        raise typer.Exit(1)


@contextmanager
def _bar() -> Iterator[OnProgress]:
    """A bar on a terminal, and nothing elsewhere."""
    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def on_progress(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, description=on_one_line(note))

        yield on_progress


def _say(line: str) -> None:
    if line and not line.startswith("progress "):
        print(line, file=sys.stderr)


def _as_json(report: Report, mending: Repair | None) -> dict:
    said = asdict(report) | {"sound": report.sound}
    if mending:
        said |= {
            "repaired": [asdict(done) for done in mending.done],
            "found": [asdict(finding) for finding in mending.before.findings],
        }
    return said


def _show(report: Report, mending: Repair | None) -> None:
    if mending:
        for finding in mending.before.findings:
            _print_finding(finding)
        for done in mending.done:
            word, style = ("repaired", "green") if done.mended else ("left", "bold red")
            _print(word, style, f"{done.path}: {done.how}")
        if report.findings:
            console.print("Still:")
    for finding in report.findings:
        _print_finding(finding)
    for path in report.stale:
        _print(
            "edited", "dim", f"{path} since the last run: olivepress status says what that means"
        )
    for process in report.at_work:
        _print("note", "yellow", f"process {process} is at work here: what it writes may be named")
    kinds = f"{report.files} files, {report.objects} objects and {report.records} records"
    size = f"{report.size / 1e6:,.1f} MB, in {report.seconds:.1f} s"
    verdict = "all sound" if report.sound else f"{len(report.findings)} not as recorded"
    console.print(f"{kinds} of the cache, {size}: {verdict}")
    if not report.sound and not mending:
        console.print("olivepress verify --repair brings back what can be brought back")


def _print_finding(finding: Finding) -> None:
    of = f" ({', '.join(finding.of)})" if finding.of else ""
    note = f": {finding.note}" if finding.note else ""
    _print(finding.what, "bold red", f"{finding.path}{of}{note}")


def _print(word: str, style: str, text: str) -> None:
    console.print(f"[{style}]{word:<10}[/] ", end="")
    console.print(on_one_line(text), markup=False)
