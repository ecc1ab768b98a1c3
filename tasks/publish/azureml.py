"""An Azure ML workspace, or a registry that workspaces share."""

from __future__ import annotations

from stages import azure, blobs
from stages.errors import UserError
from tasks.publish.content import DIGEST, Content
from tasks.publish.targets import Told

STUDIO = "https://ml.azure.com"


class AzureML:
    """Models as `az ml model create` registers them, of type custom_model.

    Raises:
        UserError: as `stages.azure.connect`; from each method, when Azure refuses, in one line.
    """

    def __init__(self, place: azure.Place) -> None:
        self.place = place
        self.where = str(place)
        self.client = azure.connect(place)

    def versions(self, name: str) -> dict[str, str | None]:
        """Archived ones too: their numbers are taken."""
        from azure.ai.ml.constants import ListViewType
        from azure.core.exceptions import ResourceNotFoundError

        with azure.explained(f"{self.where}: {name}"):
            try:
                found = list(self.client.models.list(name, list_view_type=ListViewType.ALL))
            except ResourceNotFoundError:
                return {}
        return {str(model.version): (model.properties or {}).get(DIGEST) for model in found}

    def add(self, content: Content, name: str, version: str, told: Told) -> None:
        from azure.ai.ml.constants import AssetTypes
        from azure.ai.ml.entities import Model
        from azure.core.exceptions import HttpResponseError

        registry = self.place.registry_name
        # The bytes name the folder, so a second try goes on where the first was cut, and two that
        # publish at once do not meet.
        prefix = f"olivepress/{name}/{content.sums}/"
        with azure.explained(f"{self.where}: {name} version {version}"):
            if registry:
                store = blobs.Store(
                    lambda: azure.registry_upload(self.client, registry, name, version), self.where
                )
                path = f"{store.container.url.partition('?')[0]}/{prefix}"
            else:
                store = blobs.Store(lambda: azure.store_container(self.client), self.where)
                path = f"azureml://datastores/{azure.STORE}/paths/{prefix}"
            blobs.upload(store, prefix, content.files, told)
            content.check()
            model = Model(
                name=name,
                version=version,
                path=path.rstrip("/"),
                type=AssetTypes.CUSTOM_MODEL,
                description=content.description,
                tags=content.tags,
                properties=content.properties,
            )
            try:
                self.client.models.create_or_update(model)
            except HttpResponseError:
                if self.versions(name).get(version, content.digest) == content.digest:
                    raise
                raise UserError(
                    f"{self.where}: {name} version {version} was taken by another meanwhile; "
                    "try again"
                ) from None
        if self.versions(name).get(version) != content.digest:
            raise UserError(f"{self.where}: {name} version {version} is not what was registered")

    def address(self, name: str, version: str) -> str:
        place = self.place
        if place.registry_name:
            return f"{STUDIO}/registries/{place.registry_name}/models/{name}/version/{version}"
        return (
            f"{STUDIO}/model/{name}:{version}/details?wsid=/subscriptions/{place.subscription_id}"
            f"/resourceGroups/{place.resource_group}/providers/Microsoft.MachineLearningServices"
            f"/workspaces/{place.workspace_name}"
        )
