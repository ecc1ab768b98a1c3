"""`olivepress publish`: the package, registered by name and version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.console import Json, in_project, print_json, quiet_prefect, stop, without_gc


def publish(
    name: Annotated[str, typer.Option("-n", "--name", help="Of the model, there.")],
    *,
    to: Annotated[
        Literal["azureml", "local"] | None,
        typer.Option(help="Default: Azure ML if a workspace or registry is known, else local."),
    ] = None,
    version: Annotated[
        str | None, typer.Option("-v", "--version", help="Default: the next one.")
    ] = None,
    subscription_id: Annotated[str | None, typer.Option("--subscription-id")] = None,
    resource_group: Annotated[str | None, typer.Option("-g", "--resource-group")] = None,
    workspace_name: Annotated[str | None, typer.Option("-w", "--workspace-name")] = None,
    registry_name: Annotated[
        str | None, typer.Option(help="A registry that workspaces share, not a workspace.")
    ] = None,
    folder: Annotated[
        str | None, typer.Option(help="local: where versions are kept.", show_default="published")
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(help="local: an MLflow server.", show_default="MLFLOW_TRACKING_URI"),
    ] = None,
    try_it: Annotated[
        bool, typer.Option("--try/--no-try", help="Serve the package here and ask its models.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Register the package as a version of a model; the same content again is not sent again."""
    with in_project() as root:
        from stages import azure
        from tasks import server
        from tasks.publish.request import make
        from tasks.terminal import terminal

        asked = {
            "to": to,
            "version": version,
            "subscription_id": subscription_id,
            "resource_group": resource_group,
            "workspace_name": workspace_name,
            "registry_name": registry_name,
            "folder": folder,
            "tracking_uri": tracking_uri,
        }
        place = {key: asked[key] for key in azure.VARIABLES}
        rest = {key: value for key, value in asked.items() if key not in place}
        make(root, name, place, **rest)  # what is wrong with it is told before a flow records it
        quiet_prefect(verbose=False)
        api = server.ensure(root)
        terminal.quiet = as_json
        try:
            state = _run_flow(root, {"name": name, **asked, "try_it": try_it})
        except KeyboardInterrupt:
            stop("stopped; the next try goes on from what has arrived", 130)
        if not state.is_completed():
            stop(state.message)
        done = state.result()
        done["url"] = f"{server.ui_url(api)}/runs/flow-run/{state.state_details.flow_run_id}"
        if as_json:
            print_json(done)
            return
        typer.echo(
            f"{done['status']}: {done['name']} version {done['version']}, {done['files']} files, "
            f"{done['bytes'] / 1e6:,.1f} MB, in {done['where']}\n{done['address']}\n"
            f"content {done['digest']}\nThis run: {done['url']}"
        )
        if try_it:
            typer.echo(f"tried: {done['tried']}")


def _run_flow(root: Path, asked: dict[str, Any]) -> Any:
    with without_gc():
        from flows.publish import publish as flow
        from tasks import alive

    return alive.run(root, flow, asked)
