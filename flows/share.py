"""`olivepress push` and `pull`: what the pipeline made, to and from a DVC remote."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.console import Json, in_project, print_json, stop

Remote = Annotated[
    str | None, typer.Option("-r", "--remote", metavar="NAME", show_default="DVC's default remote")
]
Limit = Annotated[
    float, typer.Option("--time-limit", min=0, metavar="MINUTES", help="Stop after so long.")
]


def push(remote: Remote = None, time_limit: Limit = 720, as_json: Json = False) -> None:
    """Send outputs, data and the run-cache to a remote; what it has is not sent again."""
    _move("push", remote, time_limit, as_json)


def pull(remote: Remote = None, time_limit: Limit = 720, as_json: Json = False) -> None:
    """Bring outputs, data and the run-cache from a remote: a fresh clone computes nothing."""
    _move("pull", remote, time_limit, as_json)


def _move(verb: str, remote: str | None, minutes: float, as_json: bool) -> None:
    with in_project() as root, Console(stderr=True).status(verb) as status:
        from tasks import remote as remotes

        move: Callable[..., remotes.Moved] = remotes.push if verb == "push" else remotes.pull
        try:
            with _turn(root) if verb == "pull" else nullcontext():
                moved = move(
                    root,
                    remote=remote,
                    limit_seconds=minutes * 60,
                    on_progress=lambda done, total, note: status.update(f"{verb}: {note}"),
                )
        except KeyboardInterrupt:
            stop(f"stopped; what has arrived stays: olivepress {verb} goes on from there", 130)
    _show(verb, moved, as_json)


def _turn(root: Path) -> AbstractContextManager[None]:
    """A pull changes what a run reads."""
    from tasks.turn import turn

    return turn(root, lambda who: typer.echo(f"waits for {who}", err=True), "a pull")


def _show(verb: str, moved: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(moved))
    else:
        typer.echo(
            f"{verb}: {moved.files} files, {moved.seconds:.1f} s, {moved.remote} {moved.url}"
        )
        for stage, reasons in moved.missing.items():
            typer.echo(f"not in the remote: {stage} ({', '.join(reasons)})")
        if moved.missing:
            typer.echo("olivepress run computes what is missing")
    if moved.damaged:
        stop(
            f"{moved.url}: refused, as the content does not match the name: "
            f"{', '.join(moved.damaged)}; olivepress run computes it; to mend the remote, remove "
            "these there and push"
        )
