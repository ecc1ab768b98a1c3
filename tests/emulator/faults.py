"""Faults on demand: rules that change what happens to the calls that they match."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """One rule. The first that matches a call and is not used up is applied to it."""

    host: str = ""
    """Regular expression, searched in the host's name."""
    path: str = ""
    """Regular expression, searched in the path with its query."""
    method: str = ""
    """Regular expression for the whole method, such as `PUT|POST`."""
    status: int = 0
    """Answer with this status instead of the service's own answer."""
    body: Any = None
    """With `status`: a text, or an object that is sent as JSON."""
    headers: dict[str, str] = field(default_factory=dict)
    """With `status`: such as Retry-After."""
    delay: float = 0
    """Wait so many seconds first."""
    cut_request: int | None = None
    """Close the connection when so many bytes of the request's body were read."""
    cut_response: int | None = None
    """Close the connection when so many bytes of the answer's body were sent."""
    corrupt: int | None = None
    """Flip the bits of the byte at this place of the answer's body."""
    times: int | None = 1
    """How many calls it is applied to; None is all."""
    after: int = 0
    """How many matching calls are left alone before that."""
    seen: int = 0
    """How many calls matched so far."""

    def takes(self, method: str, host: str, path: str) -> bool:
        """Count a call that matches, and say whether to apply the rule to it."""
        if not (re.search(self.host, host) and re.search(self.path, path)):
            return False
        if self.method and not re.fullmatch(self.method, method):
            return False
        self.seen += 1
        return self.seen > self.after and (
            self.times is None or self.seen <= self.after + self.times
        )

    def note(self) -> str:
        """What it does, for the log of calls."""
        names = ("status", "delay", "cut_request", "cut_response", "corrupt")
        does = {name: getattr(self, name) for name in names}
        return "fault: " + ", ".join(f"{k} {v}" for k, v in does.items() if v not in (0, None))
