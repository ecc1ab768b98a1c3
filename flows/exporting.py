"""`olivepress export`: the model for another device than the one that the pipeline packages."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.console import Json, console, in_project, print_json, stop
from stages.errors import UserError

FOLDER = Path("exports")


def export(
    target: Annotated[
        str | None, typer.Option(help="What it is for, as --list names it.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write.", show_default="exports/TARGET")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Build this adapter in, for a runtime that knows no adapters."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what each target is.")] = False,
    as_json: Json = False,
) -> None:
    """Write the quantized model and its adapters for another device; params.yaml stays."""
    if list_:
        _print_targets(as_json)
        return
    if target is None:
        stop("--target: which? olivepress export --list names them")
    wanted = Path.cwd() / out if out else None
    with in_project():
        from stages import params, recipes, stage

        for name, value in stage.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        target = recipes.named(target)
        folder = wanted or FOLDER / target
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder}: is there already; remove it, or name another with --out")
        values = params.load()
        with stage.new_output(folder) as path, redirect_stdout(sys.stderr):
            adapters = recipes.write(target, values, path, adapter)
        reason = recipes.try_on_cpu(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
        if as_json:
            written = {"folder": str(folder), "adapters": adapters, "built_in": adapter}
            print_json(_as_json(target) | written | {"size_mb": size, "not_tried": reason})
            return
        recipe = recipes.RECIPES[target]
        typer.echo(f"{folder}: {size:,.1f} MB, adapters {', '.join(adapters) or 'none'}")
        typer.echo(f"It runs on: {recipe.runs_on}. Install: {recipe.install}.")
        tried = f"not tried on this CPU: {reason}" if reason else "tried on this CPU: scores finite"
        typer.echo(f"{tried}. Not checked: {recipe.unchecked}.")


def _as_json(target: str) -> dict[str, Any]:
    from stages import recipes

    row = next(row for row in recipes.table() if row["target"] == target)
    return {key.replace(" ", "_"): value for key, value in row.items()}


def _print_targets(as_json: bool) -> None:
    from stages import recipes

    if as_json:
        targets = [_as_json(name) for name in recipes.RECIPES]
        print_json({"targets": targets, "not_reachable": recipes.ELSEWHERE})
        return
    for row in recipes.table():
        console.print(f"[bold]{row.pop('target')}[/]")
        for key, text in row.items():
            console.print(f"  {key:<16} {text}", markup=False)
    console.print("\nNot reachable with this builder, and without adapters:")
    for name, why in recipes.ELSEWHERE.items():
        console.print(f"  {name:<16} {why}", markup=False)
