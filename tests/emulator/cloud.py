"""All the services of the emulator together, and what its control port can do with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from starlette.routing import Route

from .arm import Arm, strict
from .blobs import Blobs
from .gate import Control, Gate
from .jobs import Jobs
from .library import Library
from .login import Login
from .registry import Registry
from .runner import Cluster, Runner
from .world import ARM, LOGIN, ML, REGISTRY_FRONT, World


class Cloud:
    """Azure, as far as it is played here.

    Args:
        world: what exists in it.
        storage: where Azurite listens.
        ca: the certificate authority that signed Azurite's certificate.
    """

    def __init__(self, world: World, storage: str, ca: Path) -> None:
        self.world = world
        self.gate = Gate(world.home / "calls.jsonl")
        self.blobs = Blobs(world, storage, ca)
        self.login = Login(world)
        self.control = Control(
            self.gate,
            look={"/models": self.models, "/blobs": self.list_blobs},
            act={"/reset": self.reset, "/calm": self.calm, "/cluster": self.set_cluster},
        )
        self.cluster = Cluster()
        self.env: dict[str, str] = {}
        """What a job needs to reach this; known once the ports are."""
        self._fill()

    def _fill(self) -> None:
        """New services without any content, behind the gate."""
        self.arm = Arm(self.world, self.login, self.blobs)
        self.registry = Registry(self.world, self.login, self.blobs)
        home = self.world.home / "jobs"
        shutil.rmtree(home, ignore_errors=True)
        library = Library(self.arm)
        self.jobs = Jobs(self.arm, library, Runner(home, self.blobs, self.env, self.cluster))
        found = Route(
            "/registrymanagement/v1.0/registries/{name}/discovery", self.registry.discovery
        )
        self.gate.services = [
            (LOGIN, self.login.app),
            (ARM, strict([*self.arm.routes, *library.routes, *self.jobs.routes])),
            (ML, strict([found, *self.jobs.history])),
            (REGISTRY_FRONT, self.registry.app),
            (self.world.blob_host, self.blobs),
        ]

    async def set_cluster(self, given: dict[str, Any]) -> str:
        """Change how the cluster behaves; the fields are those of `runner.Cluster`."""
        vars(self.cluster).update(vars(Cluster(**given)))
        return "done"

    async def models(self, query: dict[str, str]) -> list[dict[str, Any]]:
        """The versions of all models, of the workspace or of the registry."""
        owner = self.registry if query.get("registry") else self.arm
        return [one for versions in owner.models.versions.values() for one in versions.values()]

    async def list_blobs(self, query: dict[str, str]) -> list[dict[str, Any]]:
        container = query.get("container") or self.world.container
        return await self.blobs.list(container, query.get("prefix", ""))

    async def reset(self, _: Any = None) -> str:
        """No models, no blobs, no faults, no calls; the names and secrets stay."""
        await self.jobs.stop()
        await self.set_cluster({})
        await self.blobs.clear()
        self._fill()
        return await self.calm()

    async def calm(self, _: Any = None) -> str:
        """No faults, and no calls so far; what is stored stays."""
        self.gate.faults.clear()
        self.gate.calls.clear()
        return "done"

    async def close(self) -> None:
        await self.jobs.stop()
        await self.blobs.close()
