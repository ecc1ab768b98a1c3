"""The flows that publish: the package as it is, or after everything was brought up to date."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.optimize import optimize
from stages import params
from stages.errors import UserError
from tasks import alive, bridge, smoke
from tasks.command import stages_end_with_caller
from tasks.publish.request import make
from tasks.publish.task import publish_package
from tasks.terminal import terminal


@flow(name="publish", log_prints=False, persist_result=False)
def publish(
    name: str,
    *,
    to: str | None = None,
    version: str | None = None,
    subscription_id: str | None = None,
    resource_group: str | None = None,
    workspace_name: str | None = None,
    registry_name: str | None = None,
    folder: str | None = None,
    tracking_uri: str | None = None,
    try_it: bool = True,
) -> Any:
    """Register the package, unless the same content is there already; then serve it and ask it.

    Args:
        name: the model's name there.
        to: azureml or local; by default Azure ML if a workspace or registry is known.
        version: None for the next one.
        subscription_id, resource_group, workspace_name, registry_name: as `az ml` takes them.
        folder: local: where versions are kept.
        tracking_uri: local: an MLflow server instead.
        try_it: serve the package that was published, here, and ask each of its models.

    Returns:
        What was done, as a dictionary; or a Failed state with one line that says why not.
    """
    try:
        root = bridge.find_root()
        alive.here(root)
        place = {
            "subscription_id": subscription_id,
            "resource_group": resource_group,
            "workspace_name": workspace_name,
            "registry_name": registry_name,
        }
        request = make(
            root,
            name,
            place,
            to=to,
            version=version,
            folder=folder,
            tracking_uri=tracking_uri,
        )
        limit = params.load(root / "params.yaml").run.time_limit_minutes * 60
    except UserError as error:
        return Failed(message=f"publish: {error}")
    with stages_end_with_caller():
        state = publish_package(request, root, limit, return_state=True)
        terminal.done("publish")
        if not state.is_completed():
            return Failed(message=state.message)
        done: dict[str, Any] = state.result()  # type: ignore[assignment]
        create_markdown_artifact(markdown(done), key="published", description=state.message)
        if try_it:
            tried = smoke.smoke_test(root, limit, return_state=True)
            if not tried.is_completed():
                return Failed(message=f"{done['status']}, but {tried.message}", data=done)
            done["tried"] = tried.message
            if answers := tried.result():
                text = smoke.markdown(answers)  # type: ignore[arg-type]
                create_markdown_artifact(text, key="smoke-test", description=tried.message)
    return done


@flow(name="optimize-and-publish", log_prints=False, persist_result=False)
def optimize_and_publish(
    name: str,
    overrides: dict[str, Any] | None = None,
    to: str | None = None,
    version: str | None = None,
    try_it: bool = True,
) -> Any:
    """Bring every stage up to date, then publish what came of it, and try it.

    Args:
        name, to, version, try_it: as `publish`; the rest of it comes from params.yaml and the
            environment.
        overrides: as `optimize`.
    """
    try:
        alive.here(bridge.find_root())
    except UserError as error:
        return Failed(message=str(error))
    made: State = optimize(overrides, return_state=True)  # type: ignore[assignment]
    if not made.is_completed():
        return Failed(message=made.message)
    done: State = publish(name, to=to, version=version, try_it=try_it, return_state=True)  # type: ignore[assignment]
    return done.result() if done.is_completed() else Failed(message=done.message)


def markdown(done: dict[str, Any]) -> str:
    """What was published, as a table."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in done.items() if key != "address")
    link = done["address"]
    shown = f"[{link}]({link})" if link.startswith("https://") else f"`{link}`"
    return f"## {done['name']} version {done['version']}\n\n{shown}\n\n| | |\n|---|---|\n{rows}\n"
