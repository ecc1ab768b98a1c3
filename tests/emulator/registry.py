"""One registry: where it is found, and the front that takes and gives its models."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .answers import ServiceError, bad, body, missing
from .arm import MODEL_FIXED, Endpoint, check_model, check_scope, paged, properties, strict, under
from .assets import Assets
from .blobs import READS, WRITES, Blobs
from .login import Login
from .world import REGION, REGISTRY_FRONT, World, guid

API_VERSION = "2021-10-01-dataplanepreview"
FRONT = "/mferp/managementfrontend"


class Registry:
    """The registry of the world; there is no other."""

    def __init__(self, world: World, login: Login, blobs: Blobs) -> None:
        self.world, self.login, self.blobs = world, login, blobs
        self.models = Assets(world.registry_path, "models", MODEL_FIXED, numbered=True, flavors={})
        self.containers: dict[str, str] = {}
        """The container of each model's version, by the asset's id."""
        self.pending: dict[str, int] = {}
        """How often an operation still says Running, by its id."""
        version = "/{name}/versions/{version}"
        routes: list[BaseRoute] = [
            self.route("/models", self.names),
            self.route("/models/{name}", self.container),
            self.route("/models/{name}/versions", self.versions),
            self.route(f"/models{version}", self.model),
            self.route(f"/models{version}", self.put_model, "PUT"),
            self.route(f"/tempdatarefs{version}", self.upload_place, "PUT"),
            self.route(f"/datarefs{version}", self.download_place, "POST"),
            self.route("/operationsStatus/{operation}", self.operation),
        ]
        self.app = strict(routes)

    def route(self, path: str, endpoint: Endpoint, method: str = "GET") -> Route:
        """A path that wants a token, the front's api-version and this registry."""

        async def guarded(request: Request) -> Response:
            self.login.check(request.headers.get("authorization", ""))
            check_scope(request, self.world, "registries")
            version = request.query_params.get("api-version", "")
            if version != API_VERSION:
                raise bad(f"The api-version '{version}' is not supported.")
            return await endpoint(request)

        return Route(FRONT + under("registries") + path, guarded, methods=[method])

    async def discovery(self, request: Request) -> Response:
        """On {region}.api.azureml.ms: which region and group a registry's name belongs to."""
        self.login.check(request.headers.get("authorization", ""))
        name = request.path_params["name"]
        if name != self.world.registry:
            raise missing(f"Registry {name} was not found.")
        return JSONResponse(
            {
                "registryName": name,
                "tenantId": self.world.tenant,
                "primaryRegion": REGION,
                "regions": [REGION],
                "subscriptionId": self.world.subscription,
                "resourceGroup": self.world.resource_group,
                "primaryRegionResourceProviderUri": f"https://{REGISTRY_FRONT}/",
            }
        )

    async def names(self, request: Request) -> Response:
        return paged(request, [self.models.container(name) for name in self.models.versions])

    async def container(self, request: Request) -> Response:
        return JSONResponse(self.models.container(request.path_params["name"]))

    async def versions(self, request: Request) -> Response:
        name = request.path_params["name"]
        return paged(request, self.models.listed(name, dict(request.query_params)))

    async def model(self, request: Request) -> Response:
        given = request.path_params
        return JSONResponse(self.models.find(given["name"], given["version"]))

    def _asset(self, request: Request, given: dict[str, Any]) -> str:
        where = request.path_params
        asset = (
            f"azureml://registries/{self.world.registry}/models/{where['name']}"
            f"/versions/{where['version']}"
        )
        if given.get("assetId") != asset:
            raise bad(f"The field assetId must be {asset}.")
        return asset

    def _place(self, asset: str, permissions: str) -> dict[str, Any]:
        container = self.containers[asset]
        uri = self.blobs.uri(container)
        group = self.world.registry_path.partition("/providers/")[0]
        account = f"{group}/providers/Microsoft.Storage/storageAccounts/{self.world.account}"
        return {
            "blobUri": uri,
            "storageAccountArmId": account,
            "credential": {
                "credentialType": "SAS",
                "sasUri": f"{uri}?{self.blobs.sas(container, permissions)}",
            },
        }

    async def upload_place(self, request: Request) -> Response:
        """A container of its own for one version, until that version is made."""
        given = await body(request)
        asset = self._asset(request, given)
        if given.get("temporaryDataReferenceType") != "TemporaryBlobReference":
            raise bad("The field temporaryDataReferenceType is required.")
        where = request.path_params
        if where["version"] in self.models.versions.get(where["name"], {}):
            raise ServiceError(409, "UserError", f"The asset {asset} already exists.")
        if asset not in self.containers:
            self.containers[asset] = guid()
            await self.blobs.make(self.containers[asset])
        place = self._place(asset, WRITES)
        return JSONResponse({"assetId": asset, "blobReferenceForConsumption": place})

    async def download_place(self, request: Request) -> Response:
        given = await body(request)
        asset = self._asset(request, given)
        where = request.path_params
        model = self.models.find(where["name"], where["version"])
        if given.get("blobUri") != model["properties"]["modelUri"]:
            raise bad("The field blobUri is not the asset's.")
        place = self._place(asset, READS)
        return JSONResponse({"assetId": asset, "blobReferenceForConsumption": place})

    async def put_model(self, request: Request) -> Response:
        """Make a model's version; it takes an operation that is asked for until it is done."""
        given = await properties(request)
        check_model(given)
        where = request.path_params
        asset = (
            f"azureml://registries/{self.world.registry}/models/{where['name']}"
            f"/versions/{where['version']}"
        )
        uri = given["modelUri"].partition("?")[0]
        container = self.containers.get(asset, "")
        start = f"{self.blobs.uri(container)}/"
        if not container or not uri.startswith(start):
            raise bad(f"The uri {uri} is not in the place that was given for {asset}.")
        await self.blobs.require(container, uri.removeprefix(start), uri)
        made, new = self.models.put(where["name"], where["version"], {**given, "modelUri": uri})
        if not new:
            return JSONResponse(made)
        operation = guid()
        self.pending[operation] = 1
        status = (
            f"https://{REGISTRY_FRONT}{FRONT}{self.world.registry_path}"
            f"/operationsStatus/{operation}?api-version={API_VERSION}"
        )
        started = {**made, "properties": {**made["properties"], "provisioningState": "Creating"}}
        headers = {"Azure-AsyncOperation": status, "x-ms-retry-after-ms": "100"}
        return JSONResponse(started, 201, headers)

    async def operation(self, request: Request) -> Response:
        operation = request.path_params["operation"]
        if operation not in self.pending:
            raise missing(f"Operation {operation} was not found.")
        left = self.pending[operation]
        self.pending[operation] = max(left - 1, 0)
        status = {"id": operation, "status": "Running" if left else "Succeeded"}
        return JSONResponse(status, headers={"x-ms-retry-after-ms": "100"})
