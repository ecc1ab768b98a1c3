"""What a person asks to be published, and where."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages import azure, params
from stages.errors import UserError
from stages.redact import without_secrets
from tasks import request

RESULT = "result "  # begins the line that says what was done
FOLDER = "published"


@dataclass(frozen=True)
class Request(request.Request):
    """All that `python -m tasks.publish` is told."""

    to: Literal["azureml", "local"]
    name: str
    version: str | None = None
    """None for the next one."""
    folder: str | None = FOLDER
    """None for an MLflow server."""
    tracking_uri: str | None = None
    """None for that of MLFLOW_TRACKING_URI, which may hold a password."""


def make(
    root: Path,
    name: str,
    place: Mapping[str, str | None],
    *,
    to: str | None = None,
    version: str | None = None,
    folder: str | None = None,
    tracking_uri: str | None = None,
) -> Request:
    """A request with what was left out filled in from the environment and the project.

    Without `to` it is Azure ML when a workspace or registry is known, else local; local is the
    MLflow server of MLFLOW_TRACKING_URI when that is set, else a folder.

    Raises:
        UserError: Azure ML is asked for and no workspace is known; an unknown target.
    """
    if tracking_uri and without_secrets(tracking_uri) != tracking_uri:
        raise UserError(
            "--tracking-uri: a password in an address is seen by others: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )
    named, local = any(place.values()), bool(folder or tracking_uri)
    if local and (named or to == "azureml"):
        raise UserError("--folder and --tracking-uri are for --to local, not for Azure ML")
    if named and to == "local":
        raise UserError("--to local takes no subscription, resource group, workspace or registry")
    section = params.load(root / "params.yaml").azure.model_dump()
    found = azure.Place() if local else azure.find_place(place, section, root)
    if to is None:
        to = "azureml" if named or found.complete else "local"
    if to == "azureml":
        azure.check_place(found)
        return Request("azureml", name, version, place=found)
    if to != "local":
        raise UserError(f"--to {to}: azureml or local")
    mlflow = not folder and (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
    return Request(
        "local",
        name,
        version,
        folder=None if mlflow else folder or FOLDER,
        tracking_uri=tracking_uri,
        place=azure.Place(),
    )
