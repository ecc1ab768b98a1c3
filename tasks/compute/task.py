"""A stage on a cluster, seen from the flow: a process that submits and watches the job."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact

from stages import params
from tasks.bridge import Inputs, StageFailed
from tasks.command import Job
from tasks.compute.request import LINK, Link, Request, workspace
from tasks.terminal import terminal

QUIET_SECONDS = 900.0  # the process itself gives up a silent service after 600
GRACE_SECONDS = 20.0  # two calls, to cancel the job


@dataclass
class Cluster:
    """Takes the place of this machine for one stage.

    Args:
        root: the project's folder.
        stage: its name.
        section: which workspace and machine.
        on_line: called with each line that the stage prints there.
        limit_seconds: the job is cancelled after this long, the wait for a node included.
        env: for the process that submits.
    """

    root: Path
    stage: str
    section: params.Azure
    on_line: Callable[[str], None]
    limit_seconds: float
    env: dict[str, str]
    ran_on: str | None = None

    def bring(self, key: str, inputs: Inputs) -> None:
        """As `bridge.Elsewhere`; a UserError when it is not known which workspace."""
        request = Request(
            stage=self.stage,
            key=key,
            made=inputs.made,
            files=inputs.files,
            place=workspace(self.root, self.section),
            cluster=self.section.cluster,
            instance_type=self.section.instance_type,
            limit_seconds=self.limit_seconds,
        )
        job = Job(self._hear, self.limit_seconds, self.env, QUIET_SECONDS, GRACE_SECONDS)
        argv = [sys.executable, "-m", "tasks.compute", request.as_json()]
        job.run(argv, dict(os.environ), cwd=self.root)
        if words := job.last_words(self.stage):
            raise StageFailed(words)

    def _hear(self, line: str) -> None:
        if not line.startswith(LINK):
            return self.on_line(line)
        link = Link(**json.loads(line.removeprefix(LINK)))
        self.ran_on = link.machine
        text = f"{self.stage} on {link.machine}: {link.url}"
        get_run_logger().info(text)
        terminal.note(text)
        create_link_artifact(link.url, link.name, key="cluster-job", description=text)
