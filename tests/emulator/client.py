"""The emulator as a process, for the fixture `azure`: its environment, faults, calls, content."""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .azurite import PROGRAM
from .server import Server

REPO = Path(__file__).resolve().parents[2]
CALL_SECONDS = 60
# Without the proxy that a test may have set.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Azure(Server):
    """A process `python -m tests.emulator`; the test is skipped where Azurite is not installed.

    Args:
        home: a folder for it alone, where its output is in `emulator.log`.
    """

    def __init__(self, home: Path) -> None:
        super().__init__(home / "emulator.log")
        self.home = home
        self.env: dict[str, str] = {}
        """What a subprocess needs on top of its environment."""
        self.world: dict[str, str] = {}
        """Names of what exists: registry, cluster, account, container, workspace_id, ..."""
        self._control = ""

    def __enter__(self) -> Azure:
        if not PROGRAM.exists():
            pytest.skip("Azurite is not installed: make .azurite")
        ready = self.home / "env.json"
        command = [sys.executable, "-m", "tests.emulator", "--home", self.home, "--with-parent"]
        self.start(command, ready.exists, cwd=REPO)
        self.world = json.loads(ready.read_text())
        self.env = self.world.pop("env")  # type: ignore[assignment]
        self._control = self.world.pop("control")
        return self

    @contextmanager
    def here(self) -> Iterator[None]:
        """Let Azure's clients in this process meet the emulator, until the end of the block."""
        before = {name: os.environ.get(name) for name in self.env}
        os.environ.update(self.env)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    def ml(self, registry: str | None = None, **other: Any) -> Any:
        """An `MLClient` of the workspace or of a registry; for use inside `here`.

        Args:
            registry: the registry's name.
            other: `subscription_id`, `workspace_name`, ... instead of those that exist.
        """
        from azure.ai.ml import MLClient
        from azure.identity import EnvironmentCredential

        if registry:
            return MLClient(EnvironmentCredential(), registry_name=registry, **other)
        names = {
            "subscription_id": self.world["subscription"],
            "resource_group_name": self.world["resource_group"],
            "workspace_name": self.world["workspace"],
        }
        return MLClient(EnvironmentCredential(), **{**names, **other})

    def fault(self, **rule: Any) -> None:
        """Add a rule; its fields are those of `faults.Fault`. The first that fits a call counts."""
        self._post("/faults", rule)

    def calls(
        self, path: str = "", host: str = "", method: str = "", status: int | None = None
    ) -> list[dict[str, Any]]:
        """The calls since the last reset, oldest first: method, host, path, query, status, note.

        Args:
            path: regular expression, searched in path and query.
            host: the same, in the host.
            method: the same, for the whole method.
            status: only calls that were answered so; 0 is no answer.
        """
        return [
            call
            for call in self._get("/calls")
            if re.search(path, f"{call['path']}?{call['query']}")
            and re.search(host, call["host"])
            and (not method or re.fullmatch(method, call["method"]))
            and (status is None or call["status"] == status)
        ]

    def models(self, registry: bool = False) -> list[dict[str, Any]]:
        """Every version of every model of the workspace, or of the registry, as it answers."""
        return self._get("/models", registry="1" if registry else "")

    def blobs(self, prefix: str = "", container: str = "") -> list[dict[str, Any]]:
        """Name, size and metadata of the blobs in the workspace's container, or in another."""
        return self._get("/blobs", prefix=prefix, container=container)

    def cluster(self, quota: bool = False, queue_seconds: float = 0) -> None:
        """Change the cluster until the next reset.

        Args:
            quota: there is none for its nodes, so that every job fails with the service's words.
            queue_seconds: how long each job waits for a node.
        """
        self._post("/cluster", {"quota": quota, "queue_seconds": queue_seconds})

    def reset(self) -> None:
        """Take away all models, jobs, blobs, faults and calls; names and secrets stay."""
        self._post("/reset", {})

    def calm(self) -> None:
        """Take away all faults and forget the calls; what is stored stays."""
        self._post("/calm", {})

    def _get(self, path: str, **query: str) -> Any:
        return self._open(f"{self._control}{path}?{urllib.parse.urlencode(query)}")

    def _post(self, path: str, value: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self._control}{path}", json.dumps(value).encode(), headers
        )
        return self._open(request)

    @staticmethod
    def _open(request: Any) -> Any:
        with OPENER.open(request, timeout=CALL_SECONDS) as answer:
            return json.load(answer)
