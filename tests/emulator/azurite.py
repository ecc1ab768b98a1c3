"""Azurite, Microsoft's emulator of Azure Blob storage, as a process on a free loopback port."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from stages.stage import killed_with_parent

from .server import Server

PROGRAM = Path(__file__).resolve().parents[2] / ".azurite/node_modules/.bin/azurite-blob"
LISTENS = re.compile(r"successfully listens? on https?://127\.0\.0\.1:(\d+)")
# The account that Azurite has by itself, and its published key:
# https://learn.microsoft.com/azure/storage/common/storage-connect-azurite
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


class Azurite(Server):
    """A blob service with one account; the test is skipped where Azurite is not installed.

    Args:
        folder: where it keeps its blobs, and `azurite.log` with a line for each request.
        cert: a PEM certificate, with which it speaks https and takes bearer tokens.
        key: the certificate's PEM key.
        account: the storage account.
        account_key: its key, in base64.
    """

    stop_seconds = 5  # it waits for connections that clients leave open

    def __init__(
        self,
        folder: Path,
        cert: Path | None = None,
        key: Path | None = None,
        account: str = ACCOUNT,
        account_key: str = ACCOUNT_KEY,
    ) -> None:
        super().__init__(folder / "azurite.log")
        self.folder, self.account, self.account_key = folder, account, account_key
        self.port = 0
        self._tls = ["--cert", str(cert), "--key", str(key), "--oauth", "basic"] if cert else []

    @property
    def url(self) -> str:
        """The blob service of the account."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://127.0.0.1:{self.port}/{self.account}"

    @property
    def connection_string(self) -> str:
        return (
            f"DefaultEndpointsProtocol={self.url.partition(':')[0]};AccountName={self.account};"
            f"AccountKey={self.account_key};BlobEndpoint={self.url};"
        )

    def __enter__(self) -> Azurite:
        """Start it, on the same port as before if it was stopped, and wait until it listens."""
        if not PROGRAM.exists():
            pytest.skip("Azurite is not installed: make .azurite")
        self.start(
            [
                *(PROGRAM, "--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
                *("--location", self.folder, "--skipApiVersionCheck"),
                *("--disableTelemetry", *self._tls),
            ],
            self._listens,
            env={**os.environ, "AZURITE_ACCOUNTS": f"{self.account}:{self.account_key}"},
            preexec_fn=killed_with_parent,
        )
        return self

    def _listens(self) -> bool:
        """Whether it has said so, and on which port."""
        if said := LISTENS.search(self.log.read_text()):
            self.port = int(said[1])
        return bool(said)
