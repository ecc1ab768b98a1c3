"""The made-up Azure that the emulator plays: one tenant, one workspace, one registry."""

from __future__ import annotations

import base64
import secrets
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

PROVIDER = "Microsoft.MachineLearningServices"
REGION = "eastus"  # azure-ai-ml looks up every registry there (_azure_environments.py)
LOGIN = "login.microsoftonline.com"
ARM = "management.azure.com"
ML = f"{REGION}.api.azureml.ms"
REGISTRY_FRONT = f"cert-{REGION}.experiments.azureml.net"
# Which hosts the tunnel opens; the same names are in the server's certificate.
HOSTS = (LOGIN, ARM, "*.blob.core.windows.net", "*.api.azureml.ms", "*.experiments.azureml.net")


def guid() -> str:
    return str(uuid.uuid4())


@dataclass(frozen=True)
class World:
    """What exists, new at every start; whoever knows `client_secret` may do everything."""

    home: Path
    """Where the emulator keeps its files."""
    tenant: str = field(default_factory=guid)
    client: str = field(default_factory=guid)
    client_secret: str = field(default_factory=lambda: secrets.token_urlsafe(30))
    subscription: str = field(default_factory=guid)
    resource_group: str = "press-group"
    workspace: str = "press-workspace"
    workspace_id: str = field(default_factory=guid)
    registry: str = "press-registry"
    cluster: str = "gpu-cluster"
    account: str = field(default_factory=lambda: f"press{secrets.token_hex(6)}")
    account_key: str = field(
        default_factory=lambda: base64.b64encode(secrets.token_bytes(64)).decode()
    )
    container: str = field(default_factory=lambda: f"azureml-blobstore-{guid()}")

    @property
    def workspace_path(self) -> str:
        """The workspace's resource id."""
        return self._path("workspaces", self.workspace)

    @property
    def registry_path(self) -> str:
        """The registry's resource id."""
        return self._path("registries", self.registry)

    @property
    def blob_host(self) -> str:
        return f"{self.account}.blob.core.windows.net"

    def _path(self, kind: str, name: str) -> str:
        group = f"/subscriptions/{self.subscription}/resourceGroups/{self.resource_group}"
        return f"{group}/providers/{PROVIDER}/{kind}/{name}"

    def env(self, proxy: str, ca: Path) -> dict[str, str]:
        """What a client's environment needs to meet this world instead of Azure."""
        trust = dict.fromkeys(("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"), str(ca))
        return {
            **trust,
            **dict.fromkeys(("HTTPS_PROXY", "https_proxy"), proxy),
            **dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1"),
            "AZURE_TENANT_ID": self.tenant,
            "AZURE_CLIENT_ID": self.client,
            "AZURE_CLIENT_SECRET": self.client_secret,
            "AZUREML_ARM_SUBSCRIPTION": self.subscription,
            "AZUREML_ARM_RESOURCEGROUP": self.resource_group,
            "AZUREML_ARM_WORKSPACE_NAME": self.workspace,
            "AZURE_STORAGE_ACCOUNT": self.account,
        }

    def public(self) -> dict[str, str]:
        """The names in it, without secrets."""
        return {
            k: str(v) for k, v in asdict(self).items() if k not in ("client_secret", "account_key")
        }
