"""What jobs are made of: versions of code and of environments in the workspace."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from .answers import bad, body
from .arm import Arm, paged, properties
from .assets import Assets
from .blobs import WRITES
from .world import guid

ASSET = re.compile(r"/(codes|environments)/([^/]+)/versions/([^/]+)$")


class Library:
    """The workspace's code and environments; its paths are `routes` on ARM."""

    def __init__(self, arm: Arm) -> None:
        self.world, self.blobs = arm.world, arm.blobs
        parent = self.world.workspace_path
        self.codes = Assets(parent, "codes", ("codeUri",))
        self.environments = Assets(parent, "environments", ("image", "condaFile", "build"))
        self.places: dict[tuple[str, str], str] = {}
        """The container of each code asset, by name and version."""
        version = "/{name}/versions/{version}"
        route = arm.route
        self.routes: list[BaseRoute] = [
            route("/codes/{name}/versions", self.code_versions),
            route(f"/codes{version}", self.code),
            route(f"/codes{version}", self.put_code, "PUT"),
            route(f"/codes{version}/startPendingUpload", self.upload_place, "POST"),
            route("/environments/{name}", self.environment_container),
            route("/environments/{name}/versions", self.environment_versions),
            route(f"/environments{version}", self.environment),
            route(f"/environments{version}", self.put_environment, "PUT"),
        ]

    async def code_versions(self, request: Request) -> Response:
        """By name, and by `hash` where it is asked for; nothing found is an empty list."""
        made = self.codes.versions.get(request.path_params["name"], {})
        wanted = request.query_params.get("hash")
        found = [
            one
            for one in made.values()
            if wanted in (None, (one["properties"].get("properties") or {}).get("hash_sha256"))
        ]
        return paged(request, found)

    async def code(self, request: Request) -> Response:
        return JSONResponse(self.codes.find(*_asset(request)))

    async def upload_place(self, request: Request) -> Response:
        """A container of its own for one version of code."""
        given = await body(request)
        kind = given.get("pendingUploadType")
        if kind != "TemporaryBlobReference":
            raise bad("The field pendingUploadType is required.")
        container = self.places[_asset(request)] = guid()
        await self.blobs.make(container)
        uri = self.blobs.uri(container)
        sas = {"credentialType": "SAS", "sasUri": f"{uri}?{self.blobs.sas(container, WRITES)}"}
        place = {"blobUri": uri, "storageAccountArmId": self.world.account, "credential": sas}
        return JSONResponse(
            {
                "pendingUploadId": guid(),
                "pendingUploadType": kind,
                "blobReferenceForConsumption": place,
            }
        )

    async def put_code(self, request: Request) -> Response:
        given = await properties(request)
        uri = given.get("codeUri") or ""
        container, path = self.code_place(uri)
        if self.places.get(_asset(request)) != container:
            raise bad(f"The codeUri {uri} is not in the place that was given for it.")
        await self.blobs.require(container, path, uri)
        made, new = self.codes.put(*_asset(request), given)
        return JSONResponse(made, 201 if new else 200)

    def code_place(self, uri: str) -> tuple[str, str]:
        """The container and the folder of a codeUri."""
        container, _, path = uri.removeprefix(f"https://{self.world.blob_host}/").partition("/")
        return container, path

    async def environment_container(self, request: Request) -> Response:
        return JSONResponse(self.environments.container(request.path_params["name"]))

    async def environment_versions(self, request: Request) -> Response:
        name = request.path_params["name"]
        return paged(request, self.environments.listed(name, dict(request.query_params)))

    async def environment(self, request: Request) -> Response:
        return JSONResponse(self.environments.find(*_asset(request)))

    async def put_environment(self, request: Request) -> Response:
        given = await properties(request)
        if not given.get("image") and not given.get("build"):
            raise bad("An environment needs an image or a build context.")
        made, new = self.environments.put(*_asset(request), given)
        return JSONResponse(made, 201 if new else 200)

    def known(self, assets: Assets, asset: str) -> dict[str, Any]:
        """The asset with this resource id.

        Raises:
            ServiceError: 400.
        """
        found = ASSET.search(asset)
        if (
            not found
            or asset != f"{assets.parent}{found[0]}"
            or found[3] not in assets.versions.get(found[2], {})
        ):
            raise bad(f"The asset {asset} was not found.")
        return assets.find(found[2], found[3])


def _asset(request: Request) -> tuple[str, str]:
    return request.path_params["name"], request.path_params["version"]
