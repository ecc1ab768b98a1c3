"""Command jobs of the workspace: the cluster, submitting, cancelling, and the run history."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from azure.storage.blob import BlobSasPermissions, generate_blob_sas
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .answers import ServiceError, bad, missing, system_data
from .arm import Arm, paged, properties, under
from .assets import NAME
from .library import Library
from .runner import ARTIFACTS, ENDED, LOG, Job, Runner
from .world import ARM, ML, PROVIDER, REGION

EXISTS = (
    "A job with this name already exists. If you are trying to create a new job, use a different "
    "name. If you are trying to update an existing job, the existing job's Settings cannot be "
    "changed. Only description, tags, displayName, properties, and isArchived can be updated."
)
CANCEL = "mfeOperationResults"


class Jobs:
    """The workspace's jobs; their paths are `routes` on ARM and `history` on the ML host."""

    def __init__(self, arm: Arm, library: Library, runner: Runner) -> None:
        self.arm, self.library, self.runner = arm, library, runner
        self.world, self.blobs = arm.world, arm.blobs
        self.jobs: dict[str, Job] = {}
        route = arm.route
        self.routes: list[BaseRoute] = [
            route("/computes/{name}", self.compute),
            route("/jobs", self.listed),
            route("/jobs/{name}", self.job),
            route("/jobs/{name}", self.put_job, "PUT"),
            route("/jobs/{name}/cancel", self.cancel, "POST"),
            route(f"/{CANCEL}/{{name}}", self.cancelled),
        ]
        run = f"/history/v1.0{under('workspaces')}/runs/{{name}}"
        self.history: list[BaseRoute] = [
            Route("/discovery", self.discovery),
            Route(f"{run}/details", self.details),
        ]

    async def stop(self) -> None:
        """End every job."""
        for job in self.jobs.values():
            job.cancelled.set()
        await asyncio.gather(
            *(j.task for j in self.jobs.values() if j.task), return_exceptions=True
        )

    @property
    def cluster_id(self) -> str:
        return f"{self.world.workspace_path}/computes/{self.world.cluster}"

    async def compute(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.world.cluster:
            raise ServiceError(404, "ComputeNotFound", f"Compute with name {name} was not found.")
        scale = {"minNodeCount": 0, "maxNodeCount": 1, "nodeIdleTimeBeforeScaleDown": "PT120S"}
        nodes = {"vmSize": "STANDARD_NC24ADS_A100_V4", "vmPriority": "Dedicated"}
        return JSONResponse(
            {
                "id": self.cluster_id,
                "name": name,
                "type": f"{PROVIDER}/workspaces/computes",
                "location": REGION,
                "properties": {
                    "computeType": "AmlCompute",
                    "computeLocation": REGION,
                    "provisioningState": "Succeeded",
                    "properties": {**nodes, "scaleSettings": scale},
                },
            }
        )

    def _resource(self, job: Job) -> dict[str, Any]:
        studio = f"https://ml.azure.com/runs/{job.name}?wsid={self.world.workspace_path}"
        services = {
            "Studio": {"jobServiceType": "Studio", "endpoint": studio},
            "Tracking": {"jobServiceType": "Tracking", "endpoint": f"azureml://{ML}"},
        }
        return {
            "id": f"{self.world.workspace_path}/jobs/{job.name}",
            "name": job.name,
            "type": f"{PROVIDER}/workspaces/jobs",
            "properties": {**job.properties, "status": job.status, "services": services},
            "systemData": system_data(job.created, job.ended or job.created),
        }

    def find(self, request: Request) -> Job:
        """The job that the path names.

        Raises:
            ServiceError: 404.
        """
        name = request.path_params["name"]
        if name not in self.jobs:
            raise missing(f"Job {name} was not found in workspace {self.world.workspace}.")
        return self.jobs[name]

    async def job(self, request: Request) -> Response:
        return JSONResponse(self._resource(self.find(request)))

    async def listed(self, request: Request) -> Response:
        newest_first = reversed(self.jobs.values())
        return paged(request, [self._resource(job) for job in newest_first])

    async def put_job(self, request: Request) -> Response:
        name = request.path_params["name"]
        given = await properties(request)
        if not NAME.fullmatch(name):
            raise bad(f"Invalid job name: {name}")
        if name in self.jobs:
            raise bad(EXISTS)
        code = self._check(given)
        defaults = {"experimentName": "Default", "displayName": name, "inputs": {}, "outputs": {}}
        kept = {**defaults, **{k: v for k, v in given.items() if v is not None}}
        job = self.jobs[name] = Job(name, kept)
        job.task = asyncio.create_task(self.runner.run(job, code))
        return JSONResponse(self._resource(job), 201)

    def _check(self, given: dict[str, Any]) -> tuple[str, str] | None:
        """Refuse what cannot run, and say where the code is, if there is any."""
        if given.get("jobType") != "Command":
            raise bad(f"Jobs of type {given.get('jobType')} are not played here.")
        for key in ("command", "environmentId", "computeId"):
            if not given.get(key):
                raise bad(f"The field {key} is required.")
        if given["computeId"] != self.cluster_id:
            raise ServiceError(
                400, "ComputeNotFound", f"Compute {given['computeId']} was not found."
            )
        inputs = (given.get("inputs") or {}).values()
        if given.get("outputs") or any(one.get("jobInputType") != "literal" for one in inputs):
            raise bad("Inputs that are not literal, and outputs, are not played here.")
        self.library.known(self.library.environments, given["environmentId"])
        if not given.get("codeId"):
            return None
        code = self.library.known(self.library.codes, given["codeId"])
        return self.library.code_place(code["properties"]["codeUri"])

    async def cancel(self, request: Request) -> Response:
        job = self.find(request)
        if job.status in ENDED:
            raise bad(f"The job {job.name} is in the terminal state {job.status}.")
        job.status = "CancelRequested"
        job.cancelled.set()
        version = request.query_params["api-version"]
        location = f"https://{ARM}{self.world.workspace_path}/{CANCEL}/{job.name}"
        headers = {"Location": f"{location}?api-version={version}", "x-ms-retry-after-ms": "200"}
        return Response(status_code=202, headers=headers)

    async def cancelled(self, request: Request) -> Response:
        """The operation that `cancel` started: 202 until the job has ended."""
        done = self.find(request).status in ENDED
        headers = {} if done else {"x-ms-retry-after-ms": "200", "Location": str(request.url)}
        return Response(status_code=200 if done else 202, headers=headers)

    async def discovery(self, request: Request) -> Response:
        """Needs no token: which host has the workspace's other services."""
        return JSONResponse(dict.fromkeys(("api", "history", "experimentation"), f"https://{ML}"))

    async def details(self, request: Request) -> Response:
        """https://learn.microsoft.com/rest/api/azureml/ RunDetails, with links to its logs."""
        self.arm.check(request)
        job = self.find(request)
        path = f"{job.folder}/{LOG}"
        logs = {}
        if job.started:
            token = generate_blob_sas(
                self.world.account,
                ARTIFACTS,
                path,
                account_key=self.world.account_key,
                permission=BlobSasPermissions(read=True),
                expiry=datetime.now(UTC) + timedelta(hours=1),
                protocol="https",
            )
            logs = {LOG: f"{self.blobs.uri(ARTIFACTS, path)}?{token}"}
        code, message = job.error or ("", "")
        return JSONResponse(
            {
                "runId": job.name,
                "target": self.world.cluster,
                "status": job.status,
                "startTimeUtc": job.started,
                "endTimeUtc": job.ended,
                "error": {"error": {"code": code, "message": message}} if code else None,
                "warnings": [],
                "properties": {},
                "inputDatasets": [],
                "outputDatasets": [],
                "logFiles": logs,
            }
        )
