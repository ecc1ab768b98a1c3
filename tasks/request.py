"""What a child process is asked to do, as JSON in its command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from stages import azure


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of Azure ML, or of what takes its place. It holds no secret."""

    place: azure.Place

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        return cls(**{**values, "place": azure.Place(**values["place"])})
