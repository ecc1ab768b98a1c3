"""What is asked of Azure ML: one stage, for one state of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages import azure, params
from tasks import request

LINK = "link "  # begins the line that says which job it is, as JSON of a `Link`


@dataclass(frozen=True)
class Request(request.Request):
    """All that `python -m tasks.compute` is told."""

    stage: str
    key: str
    """DVC's stage key, 64 hex digits: command, hashes of inputs, parameters, paths of outputs."""
    made: list[str]
    """DVC's names of what makes its inputs."""
    files: list[str]
    """Its inputs that DVC does not keep, so that Git must."""
    cluster: str | None
    instance_type: str | None
    limit_seconds: float

    @property
    def machine(self) -> str:
        return self.cluster or f"serverless {self.instance_type}"

    def job_name(self, attempt: int) -> str:
        """The same for the same key, so that who comes later finds the job."""
        return f"olivepress-{self.stage.replace('@', '-')}-{self.key[:16]}-{attempt}"


@dataclass(frozen=True)
class Link:
    """A job that is run or watched."""

    name: str
    machine: str
    url: str


def workspace(root: Path, section: params.Azure) -> azure.Place:
    """The workspace whose clusters are meant.

    Raises:
        UserError: as `azure.find_place`; something of it is not known.
    """
    place = azure.find_place({}, section.model_dump(), root, registry=False)
    azure.check_place(place)
    return place
