"""The Prefect task that publishes, in a process of its own that can be stopped."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from prefect import get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks.command import Job, parse_progress
from tasks.publish.request import RESULT, Request
from tasks.stage import Progress

QUIET_SECONDS = 180.0  # more than the longest wait between two tries of stages.blobs


@task(task_run_name="publish {request.name}", cache_policy=NO_CACHE, persist_result=False)
def publish_package(request: Request, root: Path, limit_seconds: float) -> State:
    """Register the package under a name and version.

    Returns:
        Completed with a dictionary, the fields of `targets.Published`; named Cached when it was
        there already; Failed with one line that says why.
    """
    logger = get_run_logger()
    progress = Progress("publish")
    answer: dict = {}

    def on_line(line: str) -> None:
        if step := parse_progress(line):
            progress.update(*step)
        elif line.startswith(RESULT):
            answer.update(json.loads(line.removeprefix(RESULT)))
        elif line:
            logger.info(line)

    env = {"OLIVEPRESS_RUN_ID": str(runtime.flow_run.id or "")}
    # MLflow and a folder take whole files, however long one takes.
    job = Job(on_line, limit_seconds, env, QUIET_SECONDS if request.to == "azureml" else None)
    with job.at_work():
        job.run(
            [sys.executable, "-m", "tasks.publish", request.as_json()], dict(os.environ), cwd=root
        )
    if words := job.last_words("publish"):
        return Failed(message=words)
    name = "Completed" if answer["status"] == "published" else "Cached"
    return Completed(name=name, message=f"{answer['status']}: {answer['address']}", data=answer)
