"""Azure Resource Manager for one workspace: its datastores, models and their versions.

https://learn.microsoft.com/rest/api/azureml/
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .answers import HANDLERS, ServiceError, bad, body, missing, now, system_data
from .assets import Assets
from .blobs import WRITES, Blobs
from .login import Login
from .world import ML, PROVIDER, REGION, World

Endpoint = Callable[[Request], Awaitable[Response]]
# Those of azure-ai-ml 1.35 (_ml_client.py), and the one that its generated client has by default.
API_VERSIONS = {
    "2022-05-01",
    "2022-10-01",
    "2023-04-01",
    "2023-10-01",
    "2022-02-01-preview",
    "2022-10-01-preview",
    "2023-02-01-preview",
    "2023-04-01-preview",
    "2023-06-01-preview",
    "2023-08-01-preview",
    "2024-01-01-preview",
    "2024-04-01-preview",
    "2024-10-01-preview",
    "2025-01-01-preview",
    "2025-12-01",
}
MODEL_FIXED = ("modelUri", "modelType", "properties")
MODEL_TYPES = {"custom_model", "mlflow_model", "triton_model"}
STORE = "workspaceblobstore"
PAGE = 30


def check_scope(request: Request, world: World, kind: str) -> None:
    """Refuse any subscription, group, workspace or registry but the world's own.

    Raises:
        ServiceError: 404, with the code that Resource Manager has for it.
    """
    given = request.path_params
    name = given["owner"]
    if given["subscription"] != world.subscription:
        raise ServiceError(
            404,
            "SubscriptionNotFound",
            f"The subscription '{given['subscription']}' could not be found.",
        )
    if given["group"].lower() != world.resource_group.lower():
        raise ServiceError(
            404, "ResourceGroupNotFound", f"Resource group '{given['group']}' could not be found."
        )
    if name != {"workspaces": world.workspace, "registries": world.registry}[kind]:
        raise ServiceError(
            404,
            "ResourceNotFound",
            f"The Resource '{PROVIDER}/{kind}/{name}' under resource group '{given['group']}' "
            "was not found.",
        )


def under(kind: str) -> str:
    """The path of one workspace or registry, whose name is the parameter `owner`."""
    scope = "/subscriptions/{subscription}/resourceGroups/{group}/providers/"
    return f"{scope}{PROVIDER}/{kind}/{{owner}}"


def strict(routes: list[BaseRoute]) -> Starlette:
    """An application of these paths and no others, which refuses in the service's shape."""
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    return app


def check_model(given: dict[str, Any]) -> None:
    """Raise a ServiceError 400 unless a model's properties have what they must have."""
    for key in ("modelUri", "modelType"):
        if not given.get(key):
            raise bad(f"The field {key} is required.")
    if given["modelType"] not in MODEL_TYPES:
        raise bad(f"Invalid model type: {given['modelType']}")


async def properties(request: Request) -> dict[str, Any]:
    """The `properties` of the resource in the request."""
    given = (await body(request)).get("properties")
    if not isinstance(given, dict):
        raise bad("The field properties is required.")
    return given


def paged(request: Request, items: list[dict[str, Any]]) -> JSONResponse:
    """A page of a list, with the address of the next one."""
    query = request.query_params
    start = int(query.get("$skip") or 0)
    size = int(query.get("$top") or PAGE)
    answer: dict[str, Any] = {"value": items[start : start + size]}
    if "$top" not in query and start + size < len(items):
        answer["nextLink"] = str(request.url.include_query_params(**{"$skip": start + size}))
    return JSONResponse(answer)


class Arm:
    """The workspace, as `management.azure.com` shows it."""

    def __init__(self, world: World, login: Login, blobs: Blobs) -> None:
        self.world, self.login, self.blobs = world, login, blobs
        self.models = Assets(world.workspace_path, "models", MODEL_FIXED, numbered=True, flavors={})
        self.routes: list[BaseRoute] = [
            self.route("", self.workspace),
            self.route("/datastores", self.datastores),
            self.route("/datastores/{name}", self.datastore),
            self.route("/datastores/{name}/listSecrets", self.secrets, "POST"),
            self.route("/models", self.model_names),
            self.route("/models/{name}", self.model_container),
            self.route("/models/{name}/versions", self.model_versions),
            self.route("/models/{name}/versions/{version}", self.model),
            self.route("/models/{name}/versions/{version}", self.put_model, "PUT"),
        ]

    def check(self, request: Request) -> None:
        """Raise a ServiceError 401 without a good token, 404 for another workspace."""
        self.login.check(request.headers.get("authorization", ""))
        check_scope(request, self.world, "workspaces")

    def route(self, path: str, endpoint: Endpoint, method: str = "GET") -> Route:
        """A path that wants a token, a known api-version and this workspace."""

        async def guarded(request: Request) -> Response:
            self.check(request)
            version = request.query_params.get("api-version", "")
            if version not in API_VERSIONS:
                raise ServiceError(
                    400,
                    "InvalidApiVersionParameter",
                    f"The api-version '{version}' is invalid. The supported versions are "
                    f"'{','.join(sorted(API_VERSIONS))}'.",
                )
            return await endpoint(request)

        return Route(under("workspaces") + path, guarded, methods=[method])

    async def workspace(self, request: Request) -> Response:
        world = self.world
        group = world.workspace_path.partition("/providers/")[0]
        storage = f"{group}/providers/Microsoft.Storage/storageAccounts/{world.account}"
        return JSONResponse(
            {
                "id": world.workspace_path,
                "name": world.workspace,
                "type": f"{PROVIDER}/workspaces",
                "location": REGION,
                "tags": {},
                "kind": "Default",
                "identity": {"type": "SystemAssigned", "tenantId": world.tenant},
                "properties": {
                    "friendlyName": world.workspace,
                    "workspaceId": world.workspace_id,
                    "discoveryUrl": f"https://{ML}/discovery",
                    "mlFlowTrackingUri": f"azureml://{ML}/mlflow/v1.0{world.workspace_path}",
                    "storageAccount": storage,
                    "provisioningState": "Succeeded",
                    "publicNetworkAccess": "Enabled",
                },
                "systemData": system_data(now(), now()),
            }
        )

    def _datastore(self) -> dict[str, Any]:
        world = self.world
        return {
            "id": f"{world.workspace_path}/datastores/{STORE}",
            "name": STORE,
            "type": f"{PROVIDER}/workspaces/datastores",
            "properties": {
                "datastoreType": "AzureBlob",
                "accountName": world.account,
                "containerName": world.container,
                "endpoint": "core.windows.net",
                "protocol": "https",
                "isDefault": True,
                "credentials": {"credentialsType": "Sas"},
                "serviceDataAccessAuthIdentity": "None",
                "tags": {},
                "properties": {},
            },
            "systemData": system_data(now(), now()),
        }

    def _known_datastore(self, request: Request) -> None:
        name = request.path_params["name"]
        if name != STORE:
            raise missing(f"The datastore {name} was not found.")

    async def datastores(self, request: Request) -> Response:
        return paged(request, [self._datastore()])

    async def datastore(self, request: Request) -> Response:
        self._known_datastore(request)
        return JSONResponse(self._datastore())

    async def secrets(self, request: Request) -> Response:
        self._known_datastore(request)
        asked = await body(request)
        hours = float(asked.get("expireAfterHours") or 24)
        token = self.blobs.sas(self.world.container, WRITES, hours)
        return JSONResponse({"secretsType": "Sas", "sasToken": token})

    async def model_names(self, request: Request) -> Response:
        return paged(request, [self.models.container(name) for name in self.models.versions])

    async def model_container(self, request: Request) -> Response:
        return JSONResponse(self.models.container(request.path_params["name"]))

    async def model_versions(self, request: Request) -> Response:
        name = request.path_params["name"]
        return paged(request, self.models.listed(name, dict(request.query_params)))

    async def model(self, request: Request) -> Response:
        given = request.path_params
        return JSONResponse(self.models.find(given["name"], given["version"]))

    async def put_model(self, request: Request) -> Response:
        given = await properties(request)
        check_model(given)
        await self.blobs.require(
            self.world.container, self.datastore_path(given["modelUri"]), given["modelUri"]
        )
        where = request.path_params
        made, new = self.models.put(where["name"], where["version"], given)
        return JSONResponse(made, 201 if new else 200)

    def datastore_path(self, uri: str) -> str:
        """The path in the default container of a uri `azureml://.../datastores/NAME/paths/PATH`.

        Raises:
            ServiceError: 400 for any other uri.
        """
        start, found, path = uri.partition(f"/datastores/{STORE}/paths/")
        world = self.world
        long = f"subscriptions/{world.subscription}/resource[gG]roups/{world.resource_group}"
        known = {f"azureml://{long.replace('[gG]', g)}/workspaces/{world.workspace}" for g in "gG"}
        if not found or not path or start not in {"azureml:/", *known}:
            raise bad(f"The uri {uri} does not point into a datastore of this workspace.")
        return path
