"""`python -m tasks.compute REQUEST`: a stage in Azure ML, in a process that can be stopped.

REQUEST is the JSON of a `Request`. First the DVC remote is asked for the outputs; else the job of
this key is found or submitted, and watched to its end. Either way the outputs are in DVC's cache
then. Prints what the stage prints; exits 1 with one message on standard error. SIGTERM cancels the
job; a kill leaves it running, and the next call with the same REQUEST finds it.
"""

from __future__ import annotations

import itertools
import json
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import azure
from stages.errors import UserError
from stages.stage import die_with_parent, progress
from tasks import remote
from tasks.compute import code, submit, watch
from tasks.compute.request import LINK, Link, Request

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml.entities import Job

QUIET_SECONDS = 600.0  # for DVC, which may wait for the lock while another stage is hashed
LIMITS: dict[str, Any] = {"quiet_seconds": QUIET_SECONDS, "on_progress": progress}


class Stopped(BaseException):
    """SIGTERM came."""


def main(request: Request) -> None:
    """Bring the outputs of the stage to DVC's cache.

    Raises:
        UserError: something is missing, refused or out of reach; the stage was stopped; the job
            did not complete.
    """
    root = Path.cwd()
    code.check(root, request.stage, request.files)
    if fetched(root, request):
        return
    client = azure.connect(request.place)
    submit.check_cluster(client, request)
    for attempt in itertools.count(1):
        name = request.job_name(attempt)
        job = find(client, name)
        if job and job.status in watch.ENDED:
            if job.status == "Completed" and fetched(root, request):
                return
            continue
        try:
            run(client, request, attempt, job, root)
        except Stopped:
            watch.cancel(client, name)
            raise UserError(f"stopped; job {name} is cancelled") from None
        if not fetched(root, request):
            raise UserError(
                f"job {name} completed, but the DVC remote has no outputs for what {request.stage} "
                "reads here: is a file that Git tracks changed by a filter, or was it changed?"
            )
        return


def run(client: MLClient, request: Request, attempt: int, job: Job | None, root: Path) -> None:
    """Submit the job if there is none, and watch it to its end."""
    if job is None:
        if request.made:
            remote.push(root, request.made, **LIMITS)
        job = submit.submit(client, request, attempt, root)
    link = Link(str(job.name), request.machine, str(job.studio_url))
    print(LINK + json.dumps(asdict(link)), flush=True)
    watch.follow(client, link.name, request.stage)


def fetched(root: Path, request: Request) -> bool:
    """Whether the remote has the outputs, which are in DVC's cache then."""
    return remote.fetch_run(root, request.key, **LIMITS)


def find(client: MLClient, name: str) -> Job | None:
    """A job by its name."""
    from azure.core.exceptions import ResourceNotFoundError

    with azure.explained(f"job {name}"):
        try:
            return client.jobs.get(name)
        except ResourceNotFoundError:
            return None


def stop(number: int, frame: Any) -> None:
    """Once: a second signal would stop the cancelling."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    die_with_parent()
    signal.signal(signal.SIGTERM, stop)
    logging.disable(logging.CRITICAL)  # the SDK warns of its own experiments; errors are raised
    asked = Request.from_json(sys.argv[1])
    try:
        main(asked)
    except UserError as error:
        said = str(error)
        sys.exit(said if said.startswith(f"{asked.stage}: ") else f"{asked.stage}: {said}")
    except Stopped:
        sys.exit(f"{asked.stage}: stopped")
