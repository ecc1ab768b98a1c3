"""Submit a stage as a command job, with the environment that this project's lock describes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from stages import azure
from stages.errors import UserError
from stages.stage import COMMIT, commit
from tasks.compute import code
from tasks.compute.request import Request

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Environment, Job

REPO = Path(__file__).resolve().parents[2]
# https://github.com/Azure/AzureML-Containers; the driver is the node's, torch brings its own CUDA.
IMAGE = "mcr.microsoft.com/azureml/openmpi5.0-cuda12.6-ubuntu24.04"
NAME = "olivepress"
JOB = ["python", "-m", "tasks.compute.job"]


def check_cluster(client: MLClient, request: Request) -> None:
    """Raise a UserError unless the cluster exists; a serverless job needs none."""
    from azure.core.exceptions import ResourceNotFoundError

    if not request.cluster:
        return
    place = request.place
    with azure.explained(f"cluster {request.cluster}"):
        try:
            client.compute.get(request.cluster)
        except ResourceNotFoundError:
            raise UserError(
                f"{place} has no cluster {request.cluster}: az ml compute create --type "
                f"AmlCompute --name {request.cluster} --size Standard_NC24ads_A100_v4 "
                "--min-instances 0 --max-instances 1 --identity-type SystemAssigned "
                f"-g {place.resource_group} -w {place.workspace_name}, or set azure.cluster"
            ) from None


def submit(client: MLClient, request: Request, attempt: int, root: Path) -> Job:
    """Send the code and start the job; the one that exists, if another was quicker."""
    from azure.ai.ml import command
    from azure.ai.ml.entities import ManagedIdentityConfiguration
    from azure.core.exceptions import HttpResponseError

    name = request.job_name(attempt)
    variables = {COMMIT: json.dumps(commit()), "DVC_NO_ANALYTICS": "1"}
    if run := os.environ.get("OLIVEPRESS_RUN_ID"):
        variables["OLIVEPRESS_RUN_ID"] = run
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        code.gather(root, Path(folder))
        job = command(
            name=name,
            display_name=request.stage,
            experiment_name=NAME,
            code=folder,
            command=shlex.join([*JOB, request.stage, *(["--inputs"] if request.made else [])]),
            environment=environment(client, root),
            environment_variables=variables,
            compute=request.cluster,
            instance_type=None if request.cluster else request.instance_type,
            identity=ManagedIdentityConfiguration(),
            timeout=max(60, int(request.limit_seconds)),
            tags={"olivepress.stage": request.stage, "olivepress.key": request.key},
        )
        with azure.explained(f"job {name}"):
            try:
                return client.jobs.create_or_update(job)
            except HttpResponseError as error:
                if "already exists" not in str(error):
                    raise
                return client.jobs.get(name)


def environment(client: MLClient, root: Path) -> Environment:
    """The environment of the lock; its version is a digest, so it is registered once."""
    from azure.ai.ml.entities import Environment
    from azure.core.exceptions import ResourceNotFoundError

    lock = root / "requirements.lock"
    lines = (lock if lock.exists() else REPO / lock.name).read_text().split("\n")
    packages = [line for line in lines if line and not line.startswith("#")]
    conda = {
        "name": NAME,
        "channels": ["conda-forge"],
        "dependencies": ["python=3.11", "pip", {"pip": packages}],
    }
    version = hashlib.sha256(json.dumps([IMAGE, conda]).encode()).hexdigest()[:16]
    with azure.explained(f"environment {NAME} {version}"):
        try:
            return client.environments.get(NAME, version)
        except ResourceNotFoundError:
            return client.environments.create_or_update(
                Environment(name=NAME, version=version, image=IMAGE, conda_file=conda)
            )
