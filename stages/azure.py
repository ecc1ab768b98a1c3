"""Azure ML: where to go, who is asking, and what to say when it fails.

`stages.fetch` gets models with it, `tasks.publish` registers them, `tasks.compute` runs jobs. Of
azure-ai-ml, names that are not public are used here alone, for registries: the SDK's own upload
and download hold whole files in memory, start over after a cut and can wait for ever.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.reading import json_object
from stages.redact import without_secrets

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.ai.ml._restclient.runhistory.models import RunDetails
    from azure.ai.ml.entities import Model
    from azure.storage.blob import ContainerClient

# Seconds. A call that is not answered in time is tried again, RETRIES times in all.
TIMEOUTS = {"connection_timeout": 10, "read_timeout": 60}
RETRIES = {"retry_total": 5, "retry_backoff_max": 20}
SCOPE = "https://management.azure.com/.default"
SIGN_IN = (
    "not signed in to Azure: run `az login`, or set AZURE_TENANT_ID, AZURE_CLIENT_ID and "
    "AZURE_CLIENT_SECRET"
)
STORE = "workspaceblobstore"  # every workspace has it
# Of a person's own choice first; then those that Azure ML sets inside its jobs.
VARIABLES = {
    "subscription_id": ("AZURE_SUBSCRIPTION_ID", "AZUREML_ARM_SUBSCRIPTION"),
    "resource_group": ("AZURE_RESOURCE_GROUP", "AZUREML_ARM_RESOURCEGROUP"),
    "workspace_name": ("AZURE_WORKSPACE_NAME", "AZUREML_ARM_WORKSPACE_NAME"),
    "registry_name": ("AZURE_REGISTRY_NAME",),
}

WORKSPACE = list(VARIABLES)[:3]


@dataclass(frozen=True)
class Place:
    """A workspace, or a registry, which is shared between workspaces."""

    subscription_id: str | None = None
    resource_group: str | None = None
    workspace_name: str | None = None
    registry_name: str | None = None

    def __str__(self) -> str:
        if self.registry_name:
            return f"registry {self.registry_name}"
        return f"workspace {self.workspace_name} in {self.resource_group}"

    @property
    def complete(self) -> bool:
        workspace = self.subscription_id and self.resource_group and self.workspace_name
        return bool(self.registry_name or workspace)


def find_place(
    given: Mapping[str, str | None],
    section: Mapping[str, Any],
    root: Path = Path(),
    registry: bool = True,
) -> Place:
    """Where to go: each value from the flags, the environment, params.yaml or config.json.

    A workspace that is named nearer wins over a registry that is named farther, and the other way
    round. config.json is the file that the Azure portal offers for download; it is looked for in
    `root` and in `root`/.azureml, as the SDK does.

    Args:
        registry: whether a registry will do; without it one that is named is not looked at.

    Raises:
        UserError: config.json is not what the portal gives.
    """
    environment = {
        key: next((os.environ[name] for name in names if os.environ.get(name)), None)
        for key, names in VARIABLES.items()
    }
    values: dict[str, str] = {}
    for source in (given, environment, section, _config_json(root)):
        chosen = "workspace_name" in values or "registry_name" in values
        for key in VARIABLES if registry else WORKSPACE:
            if source.get(key) and not (chosen and key in ("workspace_name", "registry_name")):
                values.setdefault(key, str(source[key]))
    if given.get("workspace_name") and given.get("registry_name"):
        raise UserError("give --workspace-name or --registry-name, not both")
    if "workspace_name" in values and "registry_name" in values:  # of one source
        del values["workspace_name"]
    return Place(**values)


def _config_json(root: Path) -> dict[str, Any]:
    for path in (root / "config.json", root / ".azureml/config.json"):
        if path.exists():
            try:
                values = json_object(path)
                return {key: values[key] for key in WORKSPACE}
            except (UserError, KeyError):
                raise UserError(
                    f"{path}: expected subscription_id, resource_group and workspace_name, as in "
                    "the config.json that the Azure portal offers for a workspace"
                ) from None
    return {}


def check_place(place: Place) -> None:
    """Raise a UserError that says what is missing of a workspace, and where it can be set."""
    if place.complete:
        return
    missing = [key for key in WORKSPACE if getattr(place, key) is None]
    flags = ", ".join(f"--{key.replace('_', '-')}" for key in missing)
    raise UserError(
        f"which workspace? {', '.join(missing)} not known; give {flags}, set azure.{missing[0]} … "
        f"in params.yaml, {VARIABLES[missing[0]][0]} … in the environment, or download config.json "
        "from the portal into this folder"
    )


def connect(place: Place) -> MLClient:
    """A client that is known to be let in, so that nothing is uploaded in vain.

    Raises:
        UserError: not signed in; no such workspace or registry; no rights there.
    """
    import logging

    for name in ("azure", "msal"):  # an error is told once, by `explain`
        logging.getLogger(name).setLevel(logging.CRITICAL)
    check_place(place)
    from azure.ai.ml import MLClient
    from azure.core.exceptions import AzureError
    from azure.identity import DefaultAzureCredential

    credential = DefaultAzureCredential(process_timeout=30, **TIMEOUTS, retry_total=2)
    try:
        credential.get_token(SCOPE)
    except AzureError as error:
        raise UserError(_refusal(error)) from None
    with explained(str(place)):
        client = MLClient(
            credential,
            place.subscription_id,
            place.resource_group,
            workspace_name=None if place.registry_name else place.workspace_name,
            registry_name=place.registry_name,
            enable_telemetry=False,
            **TIMEOUTS,
            **RETRIES,
        )
        if not place.registry_name:
            client.workspaces.get(place.workspace_name)
        return client


def _refusal(error: Exception) -> str:
    """Why there is no login: Microsoft's own number and words, a dead network, or nobody tried."""
    text = str(error)
    if found := re.search(r"AADSTS\d+: [^.]*", text):
        return f"{SIGN_IN} ({without_secrets(found[0])})"
    # The chain of credentials wraps what the network said.
    if re.search(r"Failed to resolve|Max retries|Connection (refused|aborted|to)|timed out", text):
        return (
            "signing in to Azure: login.microsoftonline.com does not answer; is the network there?"
        )
    return SIGN_IN


def explain(error: Exception, what: str) -> str:
    """One line for an error of an Azure client: what failed, with what, and what to do."""
    status = getattr(error, "status_code", None)
    code = getattr(getattr(error, "error", None), "code", None) or getattr(
        error, "error_code", None
    )
    words = without_secrets(str(getattr(error, "message", None) or error)).strip()
    words = next((line for line in words.splitlines() if line.strip()), type(error).__name__)
    words = words.removeprefix(f"({code}) ")
    hints = {
        401: "the login is no longer valid: sign in again with `az login`",
        403: "you may not do this: ask for the role AzureML Data Scientist, and Storage Blob Data "
        "Contributor on the storage account",
        404: "check subscription, resource group and name",
        412: "it was changed meanwhile; try again",
        429: "Azure is limiting the calls; try again in some minutes",
    }
    hint = hints.get(status or 0)
    if "MD5 mismatch" in words:
        hint = "the bytes were changed on their way; try again"
    elif status is None:
        hint = "is the network there?"
    elif status >= 500:
        hint = "Azure has a problem of its own; try again in some minutes"
    label = f"{status or ''} {code or ''}".strip()
    return f"{what}: {label + ': ' if label else ''}{words}{f' ({hint})' if hint else ''}"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn every error of an Azure client into a UserError of one line about `what`."""
    try:
        yield
    except failures() as error:
        raise UserError(explain(error, what)) from None


def failures() -> tuple[type[Exception], ...]:
    """What Azure's clients raise: their own errors, and those of requests for an answer cut off."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError
    from requests import RequestException

    return AzureError, MlException, RequestException


def run_details(client: MLClient, job: str) -> RunDetails:
    """State of a job, its error, and addresses of its logs with signatures.

    https://learn.microsoft.com/rest/api/azureml/ has it as RunDetails. The SDK's own way to show
    logs starts over when the network was away, and has nothing of a job that has ended.
    """
    return client.jobs._runs_operations.get_run_details(job)


def store_container(client: MLClient, store: str = STORE) -> ContainerClient:
    """The container of a workspace's datastore, with a signature that holds for some hours."""
    from azure.ai.ml.entities import AccountKeyConfiguration, SasTokenConfiguration

    found = client.datastores.get(store, include_secrets=True)
    kept = found.credentials
    credential: Any = client._credential  # for a store without keys, which the login opens
    if isinstance(kept, SasTokenConfiguration):
        credential = kept.sas_token
    elif isinstance(kept, AccountKeyConfiguration):
        credential = kept.account_key
    host = f"{found.account_name}.blob.{found.endpoint}"
    return container(f"{found.protocol}://{host}/{found.container_name}", credential)


def container(url: str, credential: Any = None) -> ContainerClient:
    """A container by its address. It tries once: `stages.blobs` does the trying again."""
    from azure.storage.blob import ContainerClient

    return ContainerClient.from_container_url(url, credential, retry_total=0, **TIMEOUTS)  # type: ignore[arg-type]


def registry_upload(client: MLClient, registry: str, name: str, version: str) -> ContainerClient:
    """The container that a registry lends for the files of a new model version.

    Raises:
        UserError: the version exists.
    """
    from azure.ai.ml._utils._registry_utils import (
        get_asset_body_for_registry_storage,
        get_sas_uri_for_registry_asset,
    )

    operations = client.models
    uri = get_sas_uri_for_registry_asset(
        service_client=operations._registry_service_client,
        name=name,
        version=version,
        resource_group=operations._resource_group_name,
        registry=registry,
        body=get_asset_body_for_registry_storage(registry, "models", name, version),
    )
    if not uri:
        raise UserError(f"registry {registry}: {name} version {version} exists already")
    return container(uri)


def model_files(client: MLClient, model: Model) -> tuple[ContainerClient, str]:
    """Where the files of a registered model are: container, and prefix with a final slash."""
    registry = client.models._registry_name
    uri = str(model.path)
    if registry is None:
        found = re.search(r"/datastores/([^/]+)/paths/(.+)$", uri)
        if not found:
            raise UserError(f"{model.name}: its files are not in a datastore: {uri}")
        return store_container(client, found[1]), found[2].rstrip("/") + "/"
    from azure.ai.ml._utils._registry_utils import get_storage_details_for_registry_assets

    try:
        signed, _ = get_storage_details_for_registry_assets(
            service_client=client.models._registry_service_client,
            asset_name=str(model.name),
            asset_version=str(model.version),
            reg_name=registry,
            asset_type="models",
            rg_name=client.models._resource_group_name,
            uri=uri,
        )
    except KeyError:  # sasUri: a registry that everyone may read gives none
        signed = "/".join(uri.split("/")[:4])
    prefix = re.sub(r"^https://[^/]+/[^/]+/?", "", uri)  # after host and container
    return container(signed), prefix.rstrip("/") + "/" if prefix else ""
